"""Gram matrices of linear modules' inputs, X'X over every real token of ragged rows.

A forward hook on each module adds its batch's product to a running sum, so no input outlives its
batch. Modules that are handed the same tensor (queries, keys and values; gate and up) share one
matrix. Padding does not count. Of the output layer only one position per row is computed, as
nobody reads the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from deltaloom.core.encoding import Encoded
from deltaloom.core.errors import InputError
from deltaloom.engine.forward import TOKENS_PER_BATCH, budgeted, device_of
from deltaloom.engine.train import collate


@dataclass
class Grams:
    """Sums over the tokens seen, by module name."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    """First module of a group with the same input -> (in, in), symmetric; float64 for a float64
    model, else float32."""
    leader: dict[str, str] = field(default_factory=dict)
    """Module -> the one whose matrix it shares, often itself."""
    tokens: int = 0


def input_grams(
    model: Any,
    rows: Sequence[Encoded],
    pad_id: int,
    modules: Mapping[str, nn.Module],
    on_batch: Callable[[int, int], None] | None = None,
) -> Grams:
    """Gram matrices of the inputs of `modules` (Linear or Conv1D, by name) over `rows`.

    Memory beside the model: in x in numbers per group of modules with one input. A module that no
    forward pass calls has no entry. The same call gives the same bytes. `on_batch` gets rows and
    tokens of each batch. Raises InputError for a module that sees other tokens than the rows', as
    experts behind a router do.
    """
    model.eval()
    found, device = Grams(), device_of(model)
    head = model.get_output_embeddings()
    budget = TOKENS_PER_BATCH["cpu" if device.type == "cpu" else "other"]
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i].input_ids), i))
    tap = _Tap(found)
    handles = [module.register_forward_pre_hook(tap.of(name)) for name, module in modules.items()]
    if isinstance(head, nn.Linear):  # after its own tap
        handles.append(head.register_forward_pre_hook(lambda _, given: (given[0][:, -1:],)))
    try:
        for numbers in budgeted([len(rows[i].input_ids) for i in order], budget):
            batch = collate([rows[order[k]] for k in numbers], pad_id)
            mask = batch["attention_mask"].to(device)
            tap.real = mask.flatten().bool()
            with torch.no_grad():
                model(batch["input_ids"].to(device), attention_mask=mask, use_cache=False)
            tokens = int(mask.sum())
            found.tokens += tokens
            if on_batch is not None:
                on_batch(len(numbers), tokens)
    finally:
        for handle in handles:
            handle.remove()
    return found


def linear_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Linear and Conv1D modules by name, without those that share an embedding's weight and
    without experts, which see a choice of the tokens.
    """
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and id(module.weight) not in tables
        and "experts" not in name
    }


class _Tap:
    """What the hooks share: the batch's real tokens and the input last seen."""

    def __init__(self, found: Grams) -> None:
        self.found = found
        self.real = torch.empty(0)
        self._last: tuple[Tensor | None, str] = (None, "")

    def of(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        """The hook of one module."""

        def hook(_: nn.Module, given: tuple[Any, ...]) -> None:
            seen, leader = self._last
            if given[0] is seen:
                self.found.leader.setdefault(name, leader)
                return
            self._last = given[0], name
            self.found.leader.setdefault(name, name)
            self._add(name, given[0])

        return hook

    def _add(self, name: str, given: Tensor) -> None:
        flat = given.reshape(-1, given.shape[-1])  # (b T, in)
        if len(flat) != len(self.real):
            raise InputError(
                f"{name} sees {len(flat)} tokens of a batch of {len(self.real)}: which of them are "
                "padding is not known, so its inputs have no Gram matrix"
            )
        real = flat[self.real]
        real = real.to(torch.promote_types(real.dtype, torch.float32))
        product = real.T @ real
        if name in self.found.sums:
            self.found.sums[name] += product
        else:
            self.found.sums[name] = product
