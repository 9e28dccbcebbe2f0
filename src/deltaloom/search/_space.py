"""What a search may try: named dimensions, each a range or a list of choices."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, model_validator

from deltaloom.core.errors import InputError, suggest
from deltaloom.core.spec import Spec

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

Choice = str | int | float | bool | None


class Dimension(Spec):
    """One setting's values: `low` to `high`, or `choices`."""

    low: float | None = None
    """Smallest value of a range."""
    high: float | None = None
    """Largest value of a range."""
    log: bool = False
    """Whether equal ratios of a range count as equally far."""
    integer: bool = False
    """Whether a range has whole numbers only."""
    choices: Annotated[list[Choice], Field(min_length=1)] | None = None
    """Values without an order, instead of a range."""

    @model_validator(mode="after")
    def _possible(self) -> Dimension:
        if self.choices is not None:
            if self.low is not None or self.high is not None or self.log or self.integer:
                raise ValueError("has choices and a range; leave one out")
            if len({repr(one) for one in self.choices}) < len(self.choices):
                raise ValueError("has a choice twice")
            return self
        if self.low is None or self.high is None:
            raise ValueError("needs low and high, or choices")
        if self.low > self.high:
            raise ValueError(f"is empty: low = {self.low:g} is above high = {self.high:g}")
        if self.log and self.low <= 0:
            raise ValueError(f"is logarithmic from low = {self.low:g}; low must be above 0")
        if self.integer and (self.low % 1 or self.high % 1):
            raise ValueError("has whole numbers only, but low or high is none")
        return self

    def at(self, place: float) -> Choice:
        """The value at `place` in [0, 1)."""
        if self.choices is not None:
            return self.choices[int(place * len(self.choices))]
        assert self.low is not None
        assert self.high is not None
        if self.integer:
            low, high = int(self.low), int(self.high)
            if self.log:
                return min(high, round(low * (high / low) ** place))
            return low + int(place * (high - low + 1))
        if self.log:
            return self.low * (self.high / self.low) ** place
        return self.low + place * (self.high - self.low)

    def places(self, value: Any) -> list[float]:
        """Coordinates of a value: `at`'s place for a range, beyond [0, 1] where it lies outside;
        one of each choice, all 0 for a value that is none of them.
        """
        if self.choices is not None:
            return [float(type(one) is type(value) and one == value) for one in self.choices]
        assert self.low is not None
        assert self.high is not None
        if self.low == self.high:
            return [0.0]
        if self.log:
            far = math.log(max(value, self.low * 1e-6) / self.low)
            return [far / math.log(self.high / self.low)]
        return [(value - self.low) / (self.high - self.low)]

    def has(self, value: Any) -> bool:
        """Whether a value is in the range, or one of the choices."""
        if self.choices is not None:
            return any(self.places(value))
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        return 0 <= self.places(value)[0] <= 1 and not (self.integer and value % 1)

    def distribution(self) -> BaseDistribution:
        """As Optuna has it."""
        from optuna import distributions as kinds

        if self.choices is not None:
            return kinds.CategoricalDistribution(self.choices)
        assert self.low is not None
        assert self.high is not None
        if self.integer:
            return kinds.IntDistribution(int(self.low), int(self.high), log=self.log)
        return kinds.FloatDistribution(self.low, self.high, log=self.log)


Space = dict[str, Dimension]
"""Setting -> what it may be."""


def check_space(space: Mapping[str, Dimension], known: Iterable[str], where: str) -> None:
    """Raise InputError for a space without dimensions or with one that nobody knows."""
    known = sorted(known)
    if not space:
        raise InputError(f"{where}: the space is empty; give at least one of {', '.join(known)}")
    for name in space:
        if name not in known:
            raise InputError(f"{where}: space has {name!r}{suggest(name, known)}")


def first_points(space: Mapping[str, Dimension], count: int, seed: int) -> list[dict[str, Any]]:
    """`count` settings spread evenly over the space: a scrambled Halton sequence."""
    from scipy.stats import qmc

    # SciPy before 1.15 knows no other name for the seed; later ones take this one, too.
    halton = qmc.Halton(len(space), seed=seed)  # pyright: ignore[reportCallIssue]
    places = halton.random(count)
    return [
        {name: one.at(float(place)) for (name, one), place in zip(space.items(), row, strict=True)}
        for row in places
    ]
