"""How many rows to keep: the one rule that every selector shares."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, model_validator

from deltaloom.core.errors import InputError
from deltaloom.core.method import Selector, Sizes

if TYPE_CHECKING:
    from deltaloom.core.base import Base
    from deltaloom.core.examples import Examples
    from deltaloom.core.run import Run

BUDGETS = ("fraction", "count", "tokens")


class BudgetSelector(Selector):
    """Abstract: keeps a fraction, a count or a number of tokens of the pool.

    A method puts the pool's rows in an order of choice, `reach` rows long at least, and `take`
    does the rest.
    """

    fraction: Annotated[float | None, Field(gt=0, le=1)] = None
    """Share of the pool's rows to keep; 0.05 when no other budget is given (LESS, section 4.1)."""
    count: Annotated[int | None, Field(ge=1)] = None
    """Rows to keep, instead of a fraction."""
    tokens: Annotated[int | None, Field(ge=1)] = None
    """Tokens to keep, instead of a fraction: rows are kept in order of choice until the next would
    exceed it; `base` names the tokenizer that counts, prompts and responses alike."""
    deduplicate: bool = False
    """Keep only the first chosen of rows with the same text, whatever its letter case and spaces;
    others fill their places while there are any. The run's notes tell how many were dropped."""

    @model_validator(mode="after")
    def _one_budget(self) -> BudgetSelector:
        given = [name for name in BUDGETS if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"give {given[0]} or {given[1]}, not both")
        return self

    def budget(self, rows: int) -> int:
        """Rows to keep of a pool of `rows`, at most: tokens may end sooner.

        Raises InputError when the pool is too small.
        """
        if self.tokens is not None:
            return rows
        if self.count is not None:
            if self.count > rows:
                raise InputError(f"count = {self.count} is more than the pool's {rows} rows")
            return self.count
        return max(1, round((self.fraction or 0.05) * rows))

    def keeps(self, sizes: Sizes) -> int:
        """See Selector."""
        if self.tokens is not None and sizes.row_tokens:
            return min(sizes.rows, round(self.tokens / sizes.row_tokens))
        return self.budget(sizes.rows)

    def reach(self, rows: int) -> int:
        """How many rows of the order of choice `take` may look at, of a pool of `rows`."""
        most = self.budget(rows)
        return rows if self.deduplicate else most

    def take(
        self, pool: Examples, order: Iterable[int], run: Run, base: Base | None = None
    ) -> Examples:
        """The rows of `pool` to keep, given their numbers in order of choice, best first.

        Counts go to the run's notes. Raises InputError when tokens cannot be counted or are too
        few for one row.
        """
        most = self.budget(len(pool))
        length = _Length(base) if self.tokens is not None else None
        kept: list[int] = []
        seen: set[bytes] = set()
        dropped = spent = 0
        for number in map(int, order):
            if len(kept) == most:
                break
            if self.deduplicate:
                text = _fingerprint(pool, number)
                if text in seen:
                    dropped += 1
                    continue
                seen.add(text)
            if length is not None and self.tokens is not None:
                own = length.of(pool, number)
                if spent + own > self.tokens:
                    break
                spent += own
            kept.append(number)
        if self.deduplicate:
            run.note(duplicates_dropped=dropped)
        if self.tokens is not None:
            run.note(chosen_tokens=spent)
            if not kept:
                raise InputError(
                    f"tokens = {self.tokens}: not even the first chosen row fits; give more"
                )
        return pool.take(kept)


class _Length:
    """Tokens of a row as it would be tuned on: encoded, and cut to the base's context."""

    def __init__(self, base: Base | None) -> None:
        if base is None:
            raise InputError("tokens= needs base=, whose tokenizer counts them")
        self.tokenizer, self.limit = base.tokenizer(), base.max_length

    def of(self, pool: Examples, number: int) -> int:
        from deltaloom.core.encoding import encode

        (row,) = encode([pool[number]], self.tokenizer, self.limit)
        return len(row.input_ids)


def _fingerprint(pool: Examples, number: int) -> bytes:
    from deltaloom.select._text import normalised

    return hashlib.sha256(normalised(pool[number]).encode()).digest()
