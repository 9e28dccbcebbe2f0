"""Which tokens of a row its user wrote, and where the responses to them lie.

A user's tokens are those of the prompt, or of the contents of messages with the role `user`; what a
chat template adds around them, line breaks and special tokens are nobody's.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from deltaloom.core.encoding import Encoded, encode, window
from deltaloom.core.errors import InputError

if TYPE_CHECKING:
    from deltaloom.core.examples import Example

NOBODY = -1


@dataclass(frozen=True, slots=True)
class Turn:
    """One response of a row."""

    tokens: list[int]
    """Positions of its tokens in the row, special ones left out unless there are no others."""
    asked: int | None
    """The message that it answers, counted from 0; 0 for the prompt of a row without messages;
    None when no user wrote anything before it."""


@dataclass(frozen=True, slots=True)
class Marked:
    """An encoded row with the user's tokens marked."""

    row: Encoded
    user: list[int]
    """1 where a token is the user's, as long as the row's ids."""
    turns: list[Turn]


def mark(examples: Sequence[Example], tokenizer: Any, max_length: int) -> list[Marked]:
    """Encode rows as `core.encoding.encode` does and mark the user's tokens.

    A response that `max_length` cuts off whole has no turn. Raises InputError as `encode` does, and
    for a conversation whose user's texts cannot be found again behind the chat template.
    """
    return [
        _marked(example, row, tokenizer, max_length)
        for example, row in zip(examples, encode(examples, tokenizer, sys.maxsize), strict=True)
    ]


def prompt_mask(example: Example, prompt_ids: Sequence[int], tokenizer: Any) -> list[int]:
    """1 for each token of the user in `prompt_ids`, which `core.encoding.encode_prompt` made."""
    return [int(owner != NOBODY) for owner in _owners(example, prompt_ids, tokenizer)]


def last_asked(example: Example) -> list[int]:
    """The number of the last message of the user; 0 for a row without messages; else nothing."""
    if example.messages is None:
        return [] if example.prompt is None else [0]
    asked = [k for k, turn in enumerate(example.messages) if turn["role"] == "user"]
    return asked[-1:]


def with_indicator(example: Example, asked: Collection[int], indicator: str) -> Example:
    """The row with `indicator` after the user's messages of these numbers (`Turn.asked`)."""
    if not asked:
        return example
    if example.messages is None:
        return replace(example, prompt=f"{example.prompt}{indicator}")
    messages = tuple(
        {**turn, "content": turn["content"] + indicator} if k in asked else turn
        for k, turn in enumerate(example.messages)
    )
    return replace(example, messages=messages)


def _marked(example: Example, row: Encoded, tokenizer: Any, max_length: int) -> Marked:
    owners = _owners(example, row.input_ids, tokenizer, row.response_mask)
    kept = window(row.response_mask, max_length)
    special = set(tokenizer.all_special_ids)
    turns = []
    for start, stop in _runs(row.response_mask):
        before = [owner for owner in owners[:start] if owner != NOBODY]
        inside = range(max(start, kept.start), min(stop, kept.stop))
        plain = [t - kept.start for t in inside if row.input_ids[t] not in special]
        if inside:
            tokens = plain or [t - kept.start for t in inside]
            turns.append(Turn(tokens, before[-1] if before else None))
    ids, mask = row.input_ids[kept], row.response_mask[kept]
    short = Encoded(row.id, ids, mask, truncated=len(ids) < len(row.input_ids))
    return Marked(short, [int(owner != NOBODY) for owner in owners[kept]], turns)


def _owners(
    example: Example, ids: Sequence[int], tokenizer: Any, response: Sequence[int] | None = None
) -> list[int]:
    """For each token the number of the user's message that it belongs to, or NOBODY."""
    special = set(tokenizer.all_special_ids)
    if example.messages is None:
        answered = response or [0] * len(ids)
        return [
            NOBODY if one or token in special else 0
            for token, one in zip(ids, answered, strict=True)
        ]
    if not tokenizer.is_fast:
        raise InputError(
            f"{example.where}: the tokenizer does not say where its tokens lie in a text, so the "
            "user's cannot be told apart in a conversation; use rows with 'prompt'"
        )
    text = tokenizer.apply_chat_template(list(example.messages), tokenize=False)
    spans = _spans(example, text)
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    owners = [
        NOBODY if token in special else _owner(text, start, stop, spans)
        for token, (start, stop) in zip(found["input_ids"], found["offset_mapping"], strict=True)
    ]
    return _aligned(list(ids), list(found["input_ids"]), owners)


def _spans(example: Example, text: str) -> list[tuple[int, int, int]]:
    """Message number, start and stop in `text` of every text of the user."""
    spans = []
    done = 0
    for number, turn in enumerate(example.messages or ()):
        content = turn["content"].strip()
        start = text.find(content, done)
        if start >= 0:
            done = start + len(content)
            if turn["role"] == "user" and content:
                spans.append((number, start, done))
        elif turn["role"] == "user":
            raise InputError(
                f"{example.where}: the chat template changes message {number + 1}, so the user's "
                "tokens cannot be told apart; use a template that keeps the text"
            )
    return spans


def _owner(text: str, start: int, stop: int, spans: list[tuple[int, int, int]]) -> int:
    """Whose the characters `start` to `stop` are; blanks around a word belong to the word."""
    blank = len(text[start:stop]) - len(text[start:stop].lstrip())
    begin = start + blank
    for number, first, end in spans:
        if first <= begin < end and begin < stop:
            return number
    return NOBODY


def _aligned(ids: list[int], whole: list[int], owners: list[int]) -> list[int]:
    """`owners` of the tokens `whole` carried over to `ids` of the same text.

    The two differ where a token of `whole` spans the border of a response, which `encode` cuts, and
    where `ids` end before the text does; what lies between the parts that agree is nobody's.
    """
    size = min(len(ids), len(whole))
    head = next((k for k in range(size) if ids[k] != whole[k]), size)
    tail = 0
    while tail < size - head and ids[-1 - tail] == whole[-1 - tail]:
        tail += 1
    between = [NOBODY] * (len(ids) - head - tail)
    return [*owners[:head], *between, *owners[len(whole) - tail :]]


def _runs(mask: Sequence[int]) -> list[tuple[int, int]]:
    """Start and stop of every run of ones."""
    edges = [k for k in range(len(mask) + 1) if (mask[k - 1] if k else 0) != _at(mask, k)]
    return list(zip(edges[::2], edges[1::2], strict=True))


def _at(mask: Sequence[int], k: int) -> int:
    return mask[k] if k < len(mask) else 0
