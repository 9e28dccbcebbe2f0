"""Where a loaded model came from, so that another process can load it again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deltaloom.core.base import Base
from deltaloom.core.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from deltaloom.core.examples import Example, Examples

FEW = 20
"""Rows that show whether two tokenizers cut alike. Ours."""
UNCUT = 2**30
"""More tokens than a row has."""


@dataclass(frozen=True)
class Origin:
    """A base, alone or with a delta on it."""

    base: Base
    delta: str | None = None
    """Folder or hub id."""

    def load(self) -> tuple[Any, PreTrainedTokenizerBase]:
        """The model in evaluation mode, and its tokenizer."""
        if self.delta is None:
            return self.base.load(), self.base.tokenizer()
        from deltaloom.core.delta import load

        delta = load(self.delta, self.base)
        return delta.apply(self.base), delta.tokenizer(self.base)

    def lengths(self, rows: Sequence[Example]) -> list[int]:
        """How many tokens its tokenizer makes of each row; loads no model."""
        from deltaloom.core.delta import load
        from deltaloom.core.encoding import encode

        if self.delta is None:
            tokenizer = self.base.tokenizer()
        else:
            tokenizer = load(self.delta, self.base).tokenizer(self.base)
        return [len(row.input_ids) for row in encode(rows, tokenizer, UNCUT)]


def refuse_other_tokens(
    origins: Mapping[str, Origin | None], against: str, rows: Examples, where: str
) -> None:
    """Raise InputError where one tokenizer cuts the first rows otherwise than that of `against`."""
    lengths = {label: one.lengths(rows[:FEW]) for label, one in origins.items() if one is not None}
    for label, found in lengths.items():
        if found != lengths[against]:
            raise InputError(
                f"{where}: {label} has another tokenizer than {against}, and losses by token do "
                "not compare over unlike tokens; leave out compare=, or measure answers (choice, "
                "answer)"
            )
