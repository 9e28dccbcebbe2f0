"""What mergekit keeps of one model's change, rounded where it rounds.

Magnitudes and ranks with equal ones in index order (a stable sort), draws of our generator at a
probability that is itself rounded, and a rescale by the ratio of the sums of magnitudes.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from deltaloom.merge._compat_numbers import Numbers

if TYPE_CHECKING:
    from deltaloom.core.tensors import TensorEntry
    from deltaloom.merge._compat_reduce import Reduction


@dataclass(frozen=True)
class Choice:
    """How one model's change is sparsified."""

    how: str
    """none, magnitude, middle, random or ranked."""
    density: float
    gamma: float = 0.0
    epsilon: float = 0.0
    rescale: bool = False


def part_of(choice: Choice, numbers: Numbers, tensor: TensorEntry, key: tuple[int, int]) -> Part:
    """How one tensor of one model is sparsified."""
    count = tensor.count
    if choice.how == "none" or choice.density >= 1:
        return Part(choice, numbers, count)
    kept = int(choice.density * count)
    if choice.how == "magnitude":
        return Largest(choice, numbers, count, max(1, kept) if choice.density > 0 else 0)
    if choice.how == "middle":
        return Middle(choice, numbers, count, kept)
    if choice.how == "random":
        return Drawn(choice, numbers, count, key)
    return Ranked(choice, numbers, tensor, key)


class Part:
    """One model's change, kept whole; subclasses keep a part of it."""

    scans = 0
    unit = 1
    held = 0
    """As TensorRule has it."""

    def __init__(self, choice: Choice, numbers: Numbers, count: int):
        self.choice, self.numbers, self.count = choice, numbers, count

    def scan(self, number: int, start: int, change: np.ndarray, scratch: np.ndarray) -> None:
        """See TensorRule."""

    def scanned(self, number: int) -> None:
        """See TensorRule."""

    def write(self, start: int, change: np.ndarray) -> None:
        """Sparsify `change` (n,) in place."""


class Sparse(Part):
    """A part that drops elements, and perhaps rescales what stays to the magnitudes of all."""

    looks = 0
    """Scans that `look` needs."""

    def __init__(self, choice: Choice, numbers: Numbers, count: int):
        super().__init__(choice, numbers, count)
        # draws are made on bfloat16 as it is, and on all else as float32
        drawn = choice.how in ("random", "ranked") and numbers.name != "bfloat16"
        self.inside = Numbers("float32") if drawn else numbers
        self.scans = self.looks + choice.rescale
        self.sizes: list[Reduction] = []
        if choice.rescale:
            from deltaloom.merge._compat_reduce import STEP, Reduction  # starts the compiler

            self.unit = STEP
            self.sizes = [Reduction(count, count, numbers.work) for _ in range(2)]
        self.ratio: Any = None

    def look(self, number: int, change: np.ndarray) -> None:
        """See a block of the change to choose by."""

    def looked(self, number: int) -> None:
        """A scan to choose by has seen the whole tensor."""

    def restart(self) -> None:
        """The next block is the tensor's first."""

    @abstractmethod
    def drop(self, start: int, change: np.ndarray) -> None:
        """Zero in place what does not stay."""

    def scan(self, number: int, start: int, change: np.ndarray, scratch: np.ndarray) -> None:
        """Look, or add up magnitudes before and after."""
        if number < self.looks:
            self.look(number, change)
            return
        self._narrow(change)
        before, after = self.sizes
        before.add(np.abs(change, out=scratch), start)
        self.drop(start, change)
        after.add(np.abs(change, out=scratch), start)

    def scanned(self, number: int) -> None:
        """See TensorRule."""
        if number < self.looks:
            self.looked(number)
        else:
            before, after = (self.inside.scalar(one.sums[0]) for one in self.sizes)
            if not (before < 1e-7 or after < 1e-7):
                with np.errstate(all="ignore"):  # float16 sums overflow
                    self.ratio = self.inside.scalar(before / after)
        self.restart()

    def _narrow(self, change: np.ndarray) -> None:
        if self.inside.work is not change.dtype.type:
            change[:] = change.astype(self.inside.work)

    def write(self, start: int, change: np.ndarray) -> None:
        """See Part."""
        self._narrow(change)
        self.drop(start, change)
        if self.ratio is not None:
            if self.inside.work is change.dtype.type:
                change *= self.ratio
            else:
                change[:] = change.astype(self.inside.work) * self.ratio
            self.numbers.round(change)


def _bits(change: np.ndarray) -> np.ndarray:
    return change.astype(np.float32, copy=False).view(np.uint32)


class Chosen(Sparse):
    """A part that is chosen by magnitudes, compared in float32."""

    def __init__(self, choice: Choice, numbers: Numbers, count: int, ranks: list[int]):
        from deltaloom.merge._order import OrderStatistics

        # the upper half of its bits is the whole of a bfloat16
        self.looks = 0 if not ranks else 1 if numbers.name == "bfloat16" else 2
        super().__init__(choice, numbers, count)
        self.order = OrderStatistics(ranks)
        self.held = self.order.nbytes

    def look(self, number: int, change: np.ndarray) -> None:
        """See OrderStatistics."""
        self.order.count(number, _bits(change))

    def looked(self, number: int) -> None:
        """See OrderStatistics."""
        self.order.counted(number)
        if number == 0 and self.looks == 1:
            self.order.bits = [high << 15 for high in self.order.bits]


class Largest(Chosen):
    """The `kept` largest, the first of equal ones."""

    def __init__(self, choice: Choice, numbers: Numbers, count: int, kept: int):
        super().__init__(choice, numbers, count, [kept] if kept else [])
        self.left = 0

    def restart(self) -> None:
        """See Sparse."""
        self.left = self.order.equal[0] if self.order.equal else 0

    def drop(self, start: int, change: np.ndarray) -> None:
        """See Sparse."""
        from deltaloom.merge._kernels import trim

        if not self.order.bits:
            change[:] = 0
            return
        single = change.astype(np.float32, copy=False)
        self.left = trim(single.view(np.uint32), self.order.bits[0], self.left)
        if single is not change:
            change[single == 0] = 0


class Middle(Chosen):
    """`kept` elements in rising order of magnitude, equal ones in index order, below the largest
    `gamma` part; that part shrinks where otherwise fewer would be left.
    """

    def __init__(self, choice: Choice, numbers: Numbers, count: int, kept: int):
        low = max(0, count - kept - int(choice.gamma * count))
        # ranks count from the largest; those of the first and the last that stays
        ranks = [count - low, count - low - kept + 1] if kept else []
        super().__init__(choice, numbers, count, ranks)
        self.low, self.high = low, low + kept
        self.drops = self.keeps = 0

    def restart(self) -> None:
        """See Sparse."""
        if self.order.bits:
            below = [
                self.count - rank - total + equal
                for rank, equal, total in zip(
                    (self.count - self.low, self.count - self.high + 1),
                    self.order.equal,
                    self.order.totals,
                    strict=True,
                )
            ]
            self.drops, self.keeps = self.low - below[0], self.high - below[1]

    def drop(self, start: int, change: np.ndarray) -> None:
        """See Sparse."""
        from deltaloom.merge._compat_kernels import keep_middle

        if not self.order.bits:
            change[:] = 0
            return
        single = change.astype(np.float32, copy=False)
        low, high = (np.uint32(bits) for bits in self.order.bits)
        self.drops, self.keeps = keep_middle(single, low, self.drops, high, self.keeps)
        if single is not change:
            change[single == 0] = 0


class Drawn(Sparse):
    """A random part, with one probability."""

    def __init__(self, choice: Choice, numbers: Numbers, count: int, key: tuple[int, int]):
        super().__init__(choice, numbers, count)
        self.key = key
        self.limit = np.uint64(np.ceil(float(self.inside.scalar(choice.density)) * 2**32))

    def drop(self, start: int, change: np.ndarray) -> None:
        """See Sparse."""
        from deltaloom.merge._kernels import drop

        drop(change, start, *self.key, self.limit, change.dtype.type(1))


class Ranked(Sparse):
    """A random part, with probabilities that rise with the rank along the second axis."""

    def __init__(self, choice: Choice, numbers: Numbers, tensor: TensorEntry, key: tuple[int, int]):
        super().__init__(choice, numbers, tensor.count)
        self.key = key
        self.shape = tensor.shape if len(tensor.shape) > 1 else (1, tensor.count)
        own = tensor.count if len(self.shape) > 2 else self.shape[1]
        self.unit = math.lcm(self.unit, own)

    def drop(self, start: int, change: np.ndarray) -> None:
        """See Sparse."""
        from deltaloom.merge._kernels import drop_each

        if self.choice.density <= 0:
            change[:] = 0
            return
        drop_each(change, self._chances(change), False, start, *self.key)

    def _chances(self, change: np.ndarray) -> np.ndarray:
        """The chance (n,) of every element to stay, float64; each step is rounded."""
        inside, epsilon = self.inside, self.choice.epsilon
        columns = self.shape[1]
        places = np.abs(change).reshape(-1, *self.shape[1:]).argsort(axis=1, kind="stable")
        steps = inside.round(np.arange(columns, dtype=inside.work))
        steps = inside.round(steps + inside.work(1))
        if columns > 1:
            steps = inside.round(steps - steps.min())
            steps = inside.round(steps / steps.max())
        else:  # mergekit divides zero by zero here and stops
            steps = np.full(1, 0.5, inside.work)
        for factor in (2.0, epsilon):
            steps = inside.round(steps * inside.factor(factor))
        steps = inside.round(steps + inside.scalar(self.choice.density - epsilon))
        chances = np.empty(places.shape)
        wide = steps.reshape(-1, *[1] * (places.ndim - 2))
        np.put_along_axis(chances, places, np.broadcast_to(wide, places.shape), axis=1)
        return chances.ravel()
