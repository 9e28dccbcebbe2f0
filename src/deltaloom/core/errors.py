"""The two ways a piece of work ends badly, and the exit code of each."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """The input or the call is wrong; the message names the place and the remedy (exit code 2)."""

    exit_code = 2


class WorkError(RuntimeError):
    """The input was fine and the work failed, e.g. the loss became NaN (exit code 1)."""

    exit_code = 1


def suggest(wrong: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` when one of `known` is close to `wrong`, else what is known."""
    known = sorted(known)
    close = difflib.get_close_matches(wrong, known, n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(known)}" if known else ""
