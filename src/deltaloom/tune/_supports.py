"""Supports that are chosen once: the elements of all adapted weights with the largest scores."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from deltaloom.core.adapters.sparse import random_support
from deltaloom.core.atomic import new_file
from deltaloom.core.deltas._reading import known_as
from deltaloom.core.deltas.extraction import largest
from deltaloom.core.errors import InputError
from deltaloom.core.tensors import TensorFolder
from deltaloom.engine.train import collate

if TYPE_CHECKING:
    from deltaloom.core.base import Base
    from deltaloom.core.encoding import Encoded


def top(scores: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """The `count` elements of largest |score| over all weights, as rising flat indices of each.

    Elements of score zero are never chosen; of equal ones the first are.
    """
    flat = torch.cat([score.detach().float().flatten() for score in scores.values()])
    return split(largest(flat, count).indices, {name: one.numel() for name, one in scores.items()})


def at_random(sizes: dict[str, int], count: int, seed: int) -> dict[str, Tensor]:
    """`count` elements, uniform over all weights."""
    return split(random_support(sum(sizes.values()), count, seed), sizes)


def split(indices: Tensor, sizes: dict[str, int]) -> dict[str, Tensor]:
    """Rising indices into the weights laid end to end, as indices of each."""
    found, start = {}, 0
    for name, size in sizes.items():
        ends = torch.tensor([start, start + size], device=indices.device)
        first, last = torch.searchsorted(indices, ends).tolist()
        found[name] = indices[first:last] - start
        start += size
    return found


def stored(base: Base, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    """The base's own weights of the modules `names`, float32, one at a time.

    Raises InputError for a module whose weight the base does not store under its name.
    """
    with TensorFolder(base.folder) as own:
        for name in names:
            key = known_as(f"{name}.weight", own)
            if key is None:
                raise InputError(f"{base.folder}: holds no {name}.weight; leave it out of modules=")
            yield name, own.read(key).float()


def gradients(
    model: nn.Module, names: Sequence[str], rows: Sequence[Encoded], pad_id: int, batch: int
) -> dict[str, Tensor]:
    """Sum over batches of the mean loss's gradient with respect to the modules' weights."""
    modules = dict(model.named_modules())
    weights: dict[str, Any] = {name: modules[name].weight for name in names}
    for weight in weights.values():
        weight.requires_grad_(True)
    device = next(iter(weights.values())).device
    for start in range(0, len(rows), batch):
        inputs = collate(list(rows[start : start + batch]), pad_id)
        model(**{key: value.to(device) for key, value in inputs.items()}).loss.backward()
    return {name: weight.grad.cpu() for name, weight in weights.items()}


def sample(rows: Sequence[Encoded], count: int, seed: int) -> list[Encoded]:
    """`count` rows at random, all when there are no more."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    return [rows[i] for i in order[: min(count, len(rows))]]


def write(supports: dict[str, Tensor], path: Path) -> None:
    """Keep supports for a run that may be interrupted."""
    from safetensors.torch import save_file

    with new_file(path) as temporary:
        save_file(supports, temporary)


def overlap(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Elements that both supports have over elements that either has (Jaccard)."""
    both = total = 0
    for name in {*one, *other}:
        a, b = (s.get(name, torch.empty(0, dtype=torch.int64)).cpu() for s in (one, other))
        shared = int(torch.isin(a, b).sum())
        both, total = both + shared, total + len(a) + len(b) - shared
    return both / total if total else math.nan
