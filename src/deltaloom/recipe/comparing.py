"""Comparing what runs measured: paired, over seeds if there are several, corrected over tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deltaloom.core.errors import InputError
from deltaloom.core.estimate import (
    Comparison,
    Estimate,
    benjamini_hochberg,
    compare,
    compare_seeds,
    holm,
    items_needed,
)
from deltaloom.recipe.measurements import matched, read_estimates


@dataclass(frozen=True)
class Compared:
    """One task and metric measured in both."""

    key: str
    result: Comparison
    p_holm: float | None
    """Adjusted over all tasks compared, so that all verdicts hold together; None for one task."""
    p_bh: float | None
    """Adjusted so that few of the differences found are false (Benjamini-Hochberg)."""
    needed: int | None
    """Items to find the difference seen here with 80 % power, if it is the true one; None where
    it has been found, where there is none, and over seeds."""

    def to_json(self) -> dict[str, Any]:
        """The comparison with what was added."""
        added = {"p_holm": self.p_holm, "p_bh": self.p_bh, "items_needed": self.needed}
        return {**self.result.to_json(), **added}

    def __str__(self) -> str:
        text = f"{self.key}: {self.result.summary()}"
        if self.p_holm is not None:
            text += f", p_holm={self.p_holm:.2g}, p_bh={self.p_bh:.2g}"
        if self.needed is not None:
            text += f", {self.needed} items would find this difference"
        return text


def compared(first: str, second: str) -> dict[str, Compared]:
    """Every task and metric that both measured, by key; runs of several seeds have commas between.

    Raises InputError for runs without a measurement in common and for unequal numbers of seeds.
    """
    sides = [_runs(first), _runs(second)]
    if len(sides[0]) != len(sides[1]):
        raise InputError(
            f"{len(sides[0])} and {len(sides[1])} runs: give as many seeds of one as of the other"
        )
    found = [
        matched(read_estimates(a), read_estimates(b)) for a, b in zip(*sides, strict=True)
    ]  # a mapping for each seed
    keys = [key for key in found[0] if all(key in one for one in found)]
    if not keys:
        raise InputError(f"{first} and {second} measured no task by the same metric")
    results = {
        key: _compared(
            [_named(one[key][0], a) for one, a in zip(found, sides[0], strict=True)],
            [_named(one[key][1], b) for one, b in zip(found, sides[1], strict=True)],
        )
        for key in keys
    }
    return corrected(results)


def corrected(results: dict[str, Comparison]) -> dict[str, Compared]:
    """Comparisons with p-values adjusted over all of them."""
    given = [one.p_value for one in results.values()]
    several = len(given) > 1
    adjusted = zip(results.items(), holm(given), benjamini_hochberg(given), strict=True)
    return {
        key: Compared(key, one, p if several else None, q if several else None, _needed(one))
        for (key, one), p, q in adjusted
    }


def _compared(a: Sequence[Estimate], b: Sequence[Estimate]) -> Comparison:
    return compare(a[0], b[0]) if len(a) == 1 else compare_seeds(a, b, items="random")


def _needed(result: Comparison) -> int | None:
    if result.unit == "seeds" or result.favours != "neither" or not result.difference.value:
        return None
    try:
        return items_needed(result.difference.value, pilot=result)
    except InputError:  # one unit, or a difference too small to be looked for
        return None


def _named(estimate: Estimate, run: Path) -> Estimate:
    """Both runs may call what they measured by the same name."""
    return replace(estimate, of=f"{estimate.of} in {run}")


def _runs(text: str) -> list[Path]:
    return [Path(text)] if Path(text).exists() else [Path(part) for part in text.split(",")]
