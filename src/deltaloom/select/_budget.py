"""How many rows to keep: the one rule that every selector shares."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from deltaloom.core.errors import InputError
from deltaloom.core.method import Selector


class BudgetSelector(Selector):
    """Abstract: keeps a fraction or a count of the pool."""

    fraction: Annotated[float | None, Field(gt=0, le=1)] = None
    """Share of the pool's rows to keep; 0.05 when no count is given (LESS, section 4.1)."""
    count: Annotated[int | None, Field(ge=1)] = None
    """Rows to keep, instead of a fraction."""

    @model_validator(mode="after")
    def _one_budget(self) -> BudgetSelector:
        if self.fraction is not None and self.count is not None:
            raise ValueError("give fraction or count, not both")
        return self

    def budget(self, rows: int) -> int:
        """Rows to keep of a pool of `rows`; raises InputError when the pool is too small."""
        if self.count is not None:
            if self.count > rows:
                raise InputError(f"count = {self.count} is more than the pool's {rows} rows")
            return self.count
        return max(1, round((self.fraction or 0.05) * rows))
