"""Sparse deltas: a few elements per tensor, by flat index and value.

Sums hold the union of both supports, so they are exact and stay sparse; an element that cancels
stays as a zero. On disk a sparse delta is the adapter folder of `core.adapters.sparse`, which PEFT
loads: per module `sparse_indices` (int32, int64 from 2^31 elements on) and `sparse_values`
(float32), eight bytes an element, with the shapes in adapter_config.json. Tensors that are no
linear module's weight have their places in it too; PEFT refuses those by name.
"""

from __future__ import annotations

import json
import math
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltaloom.core.atomic import new_file, write_json
from deltaloom.core.base import Base
from deltaloom.core.delta import Delta, describe
from deltaloom.core.deltas._reading import CONFIG, WEIGHTS, known_as
from deltaloom.core.deltas._writing import PREFIX
from deltaloom.core.deltas.dense import Dense, add_to_model
from deltaloom.core.errors import InputError
from deltaloom.core.tensors import TensorFolder

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

PEFT_TYPE = "DELTALOOM_SPARSE"
"""What adapter_config.json calls the kind: `core.adapters.sparse` registers it with PEFT."""
INDICES, VALUES = ".sparse_indices", ".sparse_values"


@dataclass(frozen=True)
class Elements:
    """The changed elements of one tensor."""

    indices: Tensor
    """(n,) int64, flat and row-major, rising, each once."""
    values: Tensor
    """(n,) float32."""
    shape: tuple[int, ...]
    """Shape of the base's tensor."""

    def dense(self) -> Tensor:
        """The change in the base's shape, float32."""
        import torch

        flat = torch.zeros(math.prod(self.shape))
        flat[self.indices] = self.values
        return flat.reshape(self.shape)

    def joined(self, other: Elements) -> Elements:
        """Both changes, over the union of their elements."""
        import torch

        both = torch.cat([self.indices, other.indices])
        indices, places = torch.unique(both, return_inverse=True)  # sorted
        values = torch.zeros(len(indices))
        mine = len(self.indices)
        values[places[:mine]] = self.values
        values[places[mine:]] += other.values
        return Elements(indices, values, self.shape)

    def dot(self, other: Elements) -> float:
        """Inner product over the elements that both change, in float64."""
        import torch

        if len(self.indices) == 0 or len(other.indices) == 0:
            return 0.0
        places = torch.searchsorted(other.indices, self.indices).clamp_max(len(other.indices) - 1)
        both = other.indices[places] == self.indices
        return float((self.values[both].double() * other.values[places[both]].double()).sum())


class Sparse(Delta):
    """Changed elements per tensor of the base."""

    kind = "sparse"

    def __init__(self, base: Base, elements: dict[str, Elements], task: str | None = None) -> None:
        super().__init__(base)
        self.elements = elements
        self.task = task
        """PEFT's task type, None when it is not known or the terms of a sum differ in it."""

    @classmethod
    def load(cls, folder: Path, base: Base) -> Sparse:
        """The adapter folder that `save` or PEFT wrote.

        Raises InputError when it is broken, has tensors besides sparse elements, or does not fit
        the base.
        """
        file, config = folder / WEIGHTS, _config(folder)
        if not file.is_file():
            raise InputError(f"{folder} has no {WEIGHTS}; copy the adapter again, as safetensors")
        found = {}
        with TensorFolder(file) as tensors, TensorFolder(base.folder) as own:
            for key in tensors:
                module = key.removeprefix(PREFIX).removesuffix(INDICES).removesuffix(VALUES)
                pair = [f"{PREFIX}{module}{end}" for end in (INDICES, VALUES)]
                shape = config["shapes"].get(module)
                if key not in pair or not {*pair} <= {*tensors} or shape is None:
                    raise InputError(
                        f"{file}: {key} is not half of a sparse change that {CONFIG} knows; "
                        "copy both files again"
                    )
                name = module if known_as(module, own) else f"{module}.weight"
                stored = known_as(name, own)
                if stored is not None and own[stored].shape != tuple(shape):
                    raise InputError(
                        f"{file}: {name} has shape {list(shape)}, the base {base.model} "
                        f"{list(own[stored].shape)}; name the base it was made from"
                    )
                indices, values = (tensors.read(one) for one in pair)
                found[name] = Elements(indices.long(), values.float(), tuple(shape))
                _check(file, name, found[name])
        return cls(base, found, config.get("task_type"))

    def names(self) -> list[str]:
        """Tensors with changed elements."""
        return sorted(self.elements)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the base's tensor."""
        return self.elements[name].shape

    def to_dense(self, name: str) -> Tensor:
        """The change in the base's shape, float32, zero elsewhere."""
        return self.elements[name].dense()

    def __mul__(self, factor: float) -> Sparse:
        scaled = {n: replace(own, values=own.values * factor) for n, own in self.elements.items()}
        return Sparse(self.base, scaled, self.task)

    def __add__(self, other: Delta) -> Delta:
        self.same_base(other)
        if not isinstance(other, Sparse):
            return Dense(self.base, ((1.0, self),)) + other
        both = {**self.elements, **other.elements}
        for name in self.elements.keys() & other.elements.keys():
            both[name] = self.elements[name].joined(other.elements[name])
        return Sparse(self.base, both, self.task if self.task == other.task else None)

    def dot(self, other: Delta) -> float:
        """Inner product, in float64; only the other's elements at this support are looked at."""
        self.same_base(other)
        total = 0.0
        for name in sorted({*self.names()} & {*other.names()}):
            own = self.elements[name]
            if isinstance(other, Sparse):
                total += own.dot(other.elements[name])
            else:
                theirs = other.to_dense(name).flatten()[own.indices].double()
                total += float((own.values.double() * theirs).sum())
        return total

    def save(self, folder: Path) -> None:
        """Write a PEFT adapter folder, with `delta.json` beside it."""
        import torch
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        tensors, modules = {}, {}
        for name, own in sorted(self.elements.items()):
            module = name.removesuffix(".weight")
            modules[module] = own
            wide = math.prod(own.shape) > torch.iinfo(torch.int32).max
            tensors[f"{PREFIX}{module}{INDICES}"] = own.indices if wide else own.indices.int()
            tensors[f"{PREFIX}{module}{VALUES}"] = own.values.contiguous()
        with new_file(folder / WEIGHTS) as temporary:
            save_file(tensors, temporary, metadata={"format": "pt"})
        config = {
            "peft_type": PEFT_TYPE,
            "task_type": self.task or "CAUSAL_LM",
            "base_model_name_or_path": self.base.model,
            "inference_mode": True,
            "target_modules": [*modules],
            "entries": {module: len(own.indices) for module, own in modules.items()},
            "shapes": {module: list(own.shape) for module, own in modules.items()},
        }
        write_json(folder / CONFIG, config)
        describe(folder, self.kind, self.base)

    def apply(self, base: Base) -> PreTrainedModel:
        """`base` with the change added in float32, or held beside weights that are quantised."""
        if base.quantization is None:
            return add_to_model(base, self)
        from peft import PeftModel

        import deltaloom.core.adapters  # noqa: F401  (makes the kind known to PEFT)

        with tempfile.TemporaryDirectory() as folder:
            self.save(Path(folder))
            return PeftModel.from_pretrained(base.load(), folder).eval()  # pyright: ignore


def _config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise InputError(f"{path} line {error.lineno}: not JSON ({error.msg})") from None
    shapes = config.get("shapes") if isinstance(config, dict) else None
    good = isinstance(shapes, dict) and all(
        isinstance(shape, list) and all(isinstance(side, int) for side in shape)
        for shape in shapes.values()
    )
    if not good:
        raise InputError(f"{path}: does not say the shapes of the tensors; copy the adapter again")
    return config


def _check(file: Path, name: str, own: Elements) -> None:
    indices = own.indices
    rising = len(indices) < 2 or bool((indices[1:] > indices[:-1]).all())
    inside = len(indices) == 0 or (indices[0] >= 0 and indices[-1] < math.prod(own.shape))
    if len(own.values) != len(indices) or not (rising and inside):
        raise InputError(
            f"{file}: the indices of {name} are not rising, outside {list(own.shape)}, or not as "
            "many as its values; copy the file again"
        )
