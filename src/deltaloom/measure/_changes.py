"""What two changes of one base say of each other in weight space, layer by layer."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from deltaloom.core.deltas._reading import known_as
from deltaloom.core.tensors import TensorFolder

if TYPE_CHECKING:
    from torch import Tensor

    from deltaloom.core.base import Base
    from deltaloom.core.delta import Delta

LAYER = re.compile(r"\.(\d+)\.")
"""The first number in a tensor's name is its block's."""
OUTSIDE = "outside"


@dataclass
class _Sums:
    dot: float = 0.0
    first: float = 0.0
    second: float = 0.0
    weights: float = 0.0
    both: int = 0
    opposed: int = 0

    def add(self, first: Tensor | None, second: Tensor | None, weight: Tensor) -> None:
        self.weights += _square(weight)
        self.first += 0.0 if first is None else _square(first)
        self.second += 0.0 if second is None else _square(second)
        if first is not None and second is not None:
            self.dot += float((first.double() * second.double()).sum())
            # As signs, since the product of two small changes may be rounded to zero.
            signs = first.sign() * second.sign()
            self.both += int((signs != 0).sum())
            self.opposed += int((signs < 0).sum())

    def row(self) -> dict[str, float | None]:
        lengths = math.sqrt(self.first * self.second)
        size = math.sqrt(self.weights)
        return {
            "cosine": self.dot / lengths if lengths else None,
            "sign_conflicts": self.opposed / self.both if self.both else None,
            "change": math.sqrt(self.first) / size if size else None,
            "other_change": math.sqrt(self.second) / size if size else None,
        }


def compared(first: Delta, second: Delta, base: Base) -> dict[str, dict[str, float | None]]:
    """By block number (`outside` for the rest, `all` for the sum): how the two changes agree.

    `cosine` of the changes; `sign_conflicts`, of the elements that both change the share that they
    move in opposite directions; `change` and `other_change`, the length of each over that of the
    base's weights. None where there is nothing to divide by. One tensor of each is held at a time.
    Raises InputError for a delta that is no change of weights.
    """
    sums: dict[str, _Sums] = {}
    with TensorFolder(base.folder) as own:
        mine, theirs = (
            {known_as(name, own): name for name in delta.names()} for delta in (first, second)
        )
        for name in own:
            if "F" not in own[name].dtype:
                continue
            match = LAYER.search(name)
            layer = match.group(1) if match else OUTSIDE
            changes = (
                first.to_dense(mine[name]) if name in mine else None,
                second.to_dense(theirs[name]) if name in theirs else None,
            )
            for key in (layer, "all"):
                sums.setdefault(key, _Sums()).add(*changes, own.read(name).float())
    numbered = sorted(sums, key=lambda key: (not key.isdigit(), int(key) if key.isdigit() else key))
    return {key: sums[key].row() for key in numbered}


def _square(tensor: Tensor) -> float:
    return float(tensor.double().square().sum())
