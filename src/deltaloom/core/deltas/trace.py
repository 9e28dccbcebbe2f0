"""Traces: a zeroth-order run as its seed and scalars, replayed in order when weights are asked for.

A run of T steps is (rule, start, g_1..g_T, lr_1..lr_T): 8 bytes a step with one perturbation,
whatever the model's size (Malladi et al. 2023, section 2.1, note it for storage). The replay is the
run's own arithmetic without its forward passes, tensor by tensor, so it ends in the same bits on
the same machine and device; elsewhere it may differ by rounding, also where a tensor is asked for
(`to_dense` and merges replay on the CPU) of a run on a GPU. Its time is that of the run's updates.

A trace stays one under `1 * trace`; every other arithmetic gives a dense delta that replays when a
tensor is asked for. On disk: `trace.safetensors` with `scalars` (T, q) and `lr` (T,), float32, and
the rule in its metadata. An adapter's trace also holds the tensors that it started from.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from deltaloom.core.atomic import new_file
from deltaloom.core.base import Base
from deltaloom.core.delta import Delta, describe
from deltaloom.core.deltas._reading import EMBEDDINGS, HEADS, known_as
from deltaloom.core.deltas.dense import Dense
from deltaloom.core.deltas.descent import Rule, Scalars, replay
from deltaloom.core.errors import InputError
from deltaloom.core.tensors import TensorFolder

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

STORED = "trace.safetensors"
START = "start."


@dataclass(frozen=True)
class Form:
    """What a parameter is during the run."""

    shape: tuple[int, ...]
    dtype: str
    """As `float32`."""

    @classmethod
    def of(cls, tensor: Tensor) -> Form:
        """That of a tensor."""
        return cls(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))


@dataclass(frozen=True)
class Steps:
    """All steps of a run on named parameters."""

    rule: Rule
    parameters: Mapping[str, Form]
    """By the name that the model gives."""
    dtype: str
    """Type that the model was loaded in."""
    found: Sequence[Scalars]
    """(T,)."""

    def save(self, file: Path, start: Mapping[str, Tensor] | None = None) -> None:
        """Write `file`, whole or not at all; `start` are the tensors that no base has."""
        import torch
        from safetensors.torch import save_file

        about = {
            "rule": self.rule.model_dump(mode="json"),
            "parameters": {name: asdict(own) for name, own in sorted(self.parameters.items())},
            "dtype": self.dtype,
        }
        values = [list(one.values) for one in self.found]
        tensors = {
            "scalars": torch.tensor(values, dtype=torch.float32).reshape(len(values), -1),
            "lr": torch.tensor([one.lr for one in self.found], dtype=torch.float32),
            **{START + name: tensor.contiguous() for name, tensor in (start or {}).items()},
        }
        with new_file(file) as temporary:
            # one key: safetensors writes several in an order of chance
            save_file(tensors, temporary, {"trace": json.dumps(about)})

    @classmethod
    def load(cls, file: Path) -> Steps:
        """What `save` wrote; raises InputError for anything else."""
        with TensorFolder(file) as tensors:
            try:
                about = json.loads(tensors.metadata["trace"])
                rule = Rule.model_validate(about["rule"])
                forms = {
                    str(name): Form(tuple(own["shape"]), str(own["dtype"]))
                    for name, own in about["parameters"].items()
                }
                values, rates = tensors.read("scalars").tolist(), tensors.read("lr").tolist()
                pairs = zip(rates, values, strict=True)
                found = [Scalars(lr, tuple(row)) for lr, row in pairs]
                return cls(rule, forms, str(about["dtype"]), found)
            except (KeyError, ValueError, TypeError, AttributeError, ValidationError):
                raise InputError(f"{file}: is not a whole trace; copy it again") from None

    def replay(self, tensors: Mapping[str, Tensor]) -> None:
        """Make all steps again on `tensors`, in place; they hold what the run started from."""
        for name in self.parameters:
            replay(self.rule, name, tensors[name], self.found)


class Trace(Delta):
    """A zeroth-order run on parameters of the base."""

    kind = "trace"

    def __init__(self, base: Base, steps: Steps) -> None:
        super().__init__(base)
        self.steps = steps

    @classmethod
    def load(cls, folder: Path, base: Base) -> Trace:
        """The trace in `folder`; raises InputError when it is broken or does not fit the base."""
        steps = Steps.load(folder / STORED)
        delta = cls(base, steps)
        for stored, name in delta._stored.items():
            own = delta._weights.get(stored)
            shape = None if own is None else own.shape
            if shape != steps.parameters[name].shape:
                raise InputError(
                    f"{folder / STORED}: {name} has shape {list(steps.parameters[name].shape)}, "
                    f"the base {base.model} {'none' if shape is None else list(shape)}; name the "
                    "base of the run"
                )
        return delta

    def names(self) -> list[str]:
        """Tensors of the base that the run moved."""
        return sorted(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the base's tensor."""
        return self.steps.parameters[self._stored[name]].shape

    def to_dense(self, name: str) -> Tensor:
        """The replayed tensor minus the base's, float32; takes the time of its updates."""
        import torch

        own = self._stored[name]
        stored = self._weights.read(name)
        tensor = stored.to(getattr(torch, self.steps.parameters[own].dtype), copy=True)
        replay(self.steps.rule, own, tensor, self.steps.found)
        return tensor.float() - stored.float()

    def __mul__(self, factor: float) -> Delta:
        return self if factor == 1.0 else Dense(self.base, ((factor, self),))

    def __add__(self, other: Delta) -> Delta:
        self.same_base(other)
        return Dense(self.base, ((1.0, self),)) + other

    def save(self, folder: Path) -> None:
        """Write `trace.safetensors`, beside `delta.json`."""
        folder.mkdir(parents=True, exist_ok=True)
        self.steps.save(folder / STORED)
        describe(folder, self.kind, self.base)

    def apply(self, base: Base) -> PreTrainedModel:
        """The model as the run left it, to the bit, in the type that the run had."""
        model = base.load(dtype=self.steps.dtype)
        self.steps.replay(dict(model.named_parameters()))
        return model

    @cached_property
    def _stored(self) -> dict[str, str]:
        """Name of the base's stored tensor -> name that the model gives the parameter."""
        return {_stored_as(name, self._weights, self.base): name for name in self.steps.parameters}

    @cached_property
    def _weights(self) -> TensorFolder:
        return TensorFolder(self.base.folder)


def _stored_as(name: str, weights: TensorFolder, base: Base) -> str:
    found = known_as(name, weights)
    if found is None and name.endswith(EMBEDDINGS):
        # a tied pair may be stored under the head's name
        heads = [own for own in weights if own.endswith(HEADS)]
        if len(heads) == 1 and base.config().get("tie_word_embeddings", True):
            return heads[0]
    return found or name
