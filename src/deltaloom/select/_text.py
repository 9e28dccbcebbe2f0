"""What a row says, as one text."""

from __future__ import annotations

import unicodedata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deltaloom.core.examples import Example


def normalised(row: Example) -> str:
    """All the row's words, folded: composed Unicode (NFC), no letter case, single spaces.

    Roles and fields are not told apart: a conversation and the same prompt and completion are
    equal. Letters that only look alike stay different (no NFKC: it would turn x² into x2).
    """
    parts = [turn["content"] for turn in row.messages or ()]
    parts += [part for part in (row.prompt, row.text, *(row.choices or ())) if part]
    if row.response:
        parts.append(row.response)
    return " ".join(unicodedata.normalize("NFC", " ".join(parts)).casefold().split())
