"""Needles in haystacks: one sentence hidden in filler of many lengths, at many depths."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence

from deltaloom.core.errors import InputError
from deltaloom.core.examples import Example, Examples

ENDS = (".", "!", "?")
"""How the last word of a sentence ends."""


def hidden(
    needle: str,
    question: str,
    filler: Examples,
    lengths: Sequence[int],
    depths: int,
    count: Callable[[str], int],
) -> Examples:
    """A question for every length and depth, clustered by length; answers are the needle.

    The filler is the rows' texts, one after another without line breaks, again from the start if
    they are too short. `count` says how many tokens a text has; a haystack has at most `lengths`
    of them, without the needle. The needle stands after the last sentence that ends before its
    depth, and where no sentence ends after a word. Raises InputError for filler without words.
    """
    words = " ".join(_text(row) for row in filler).split()
    if not words:
        raise InputError(f"{filler.name}: holds no words to hide a needle in")
    while len(words) < max(lengths):  # a word is a token at least
        words = words + words
    rows = []
    for length in lengths:
        n = bisect_right(range(1, length + 1), length, key=lambda k: count(" ".join(words[:k])))
        own = words[:n]
        for step in range(depths):
            depth = step / (depths - 1) if depths > 1 else 0.5
            at = _place(own, round(depth * n))
            text = " ".join([*own[:at], needle, *own[at:]])
            rows.append(
                Example(
                    id=f"needle-{length}-{round(100 * depth)}",
                    source="needle",
                    where=f"needle at {depth:.0%} of {length} tokens",
                    prompt=f"{text}\n\n{question}",
                    answers=(needle,),
                    cluster=str(length),
                )
            )
    return Examples(rows, filler.name)


def _place(words: list[str], at: int) -> int:
    """The last sentence's end at or before word `at`; `at` itself where no sentence ends."""
    if at == len(words) or not any(word.endswith(ENDS) for word in words):
        return at
    return next((k for k in range(at, 0, -1) if words[k - 1].endswith(ENDS)), 0)


def _text(row: Example) -> str:
    if row.messages is not None:
        return " ".join(turn["content"] for turn in row.messages)
    return row.text or " ".join(part for part in (row.prompt, row.response) if part)
