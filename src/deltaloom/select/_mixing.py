"""What methods that weigh sources have in common: an epoch's size, its unit and its repeats."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from deltaloom.core.errors import InputError
from deltaloom.core.method import Selection, Selector, Sizes
from deltaloom.core.progress import say
from deltaloom.core.source_weights import SourceWeights, Unit, epoch

if TYPE_CHECKING:
    from deltaloom.core.base import Base
    from deltaloom.core.examples import Examples
    from deltaloom.core.run import Run


class MixtureSelector(Selector):
    """Abstract: finds weights of the pool's sources and draws one epoch by them."""

    unit: Unit = "examples"
    """What the weights are shares of: an epoch's rows, or its tokens (needs `base`, whose tokenizer
    counts them)."""
    size: Annotated[int | None, Field(ge=1)] = None
    """Rows, or tokens, of the epoch. None is the most that `repeats` allows at these weights."""
    repeats: Annotated[float, Field(ge=1)] = 1.0
    """How often a row may be in the epoch, at most; an epoch that needs more is refused (ours: none
    is repeated; Olmix caps at 5)."""

    def keeps(self, sizes: Sizes) -> int:
        """See Selector."""
        if self.size is None:
            return sizes.rows
        if self.unit == "examples":
            return self.size
        return round(self.size / sizes.row_tokens) if sizes.row_tokens else sizes.rows

    def drawn(
        self,
        pool: Examples,
        weights: Mapping[str, float],
        run: Run,
        base: Base | None,
        about: Mapping[str, Any],
    ) -> Selection:
        """The epoch by `weights`, which go with it; `about` tells what they come from.

        Raises InputError for an epoch that these settings do not allow.
        """
        lengths = self.lengths(pool, base)
        amounts = amounts_of(pool, lengths)
        total = sum(amounts.values())
        before = {name: amount / total for name, amount in amounts.items()}
        found = SourceWeights(
            weights, self.unit, self.size, self.repeats, {"before": before, **about}
        )
        chosen = epoch(pool, found, run.seed, lengths)
        counts = pool.sources()
        most = max((n / counts[name] for name, n in chosen.sources().items()), default=0.0)
        run.note(epoch_rows=len(chosen), most_repeats=round(most, 3))
        if most > 1:
            say(f"rows are in the epoch up to {most:.2f} times")
        return Selection(chosen, weights=found)

    def lengths(self, pool: Examples, base: Base | None) -> list[int] | None:
        """Tokens of each row, where they count."""
        if self.unit == "examples":
            return None
        if base is None:
            raise InputError("unit = tokens needs base=, whose tokenizer counts them")
        from deltaloom.core.encoding import encode

        return [len(row.input_ids) for row in encode(pool, base.tokenizer(), base.max_length)]


def amounts_of(pool: Examples, lengths: list[int] | None = None) -> dict[str, int]:
    """Rows, or with `lengths` tokens, of each source, by name."""
    if lengths is None:
        return dict(sorted(pool.sources().items()))
    found: dict[str, int] = {}
    for row, length in zip(pool, lengths, strict=True):
        found[row.source] = found.get(row.source, 0) + length
    return dict(sorted(found.items()))
