"""Preference data: pairs of a better and a worse answer, or answers with a label.

A row is one of, `prompt` being a text or a list of messages:

- `prompt`, `chosen`, `rejected` (texts, or messages; the prompt may be left out when both are whole
  conversations): a pair;
- `prompt`, `completion`, `label` (true: desirable): one answer;
- `prompt`, `candidates` (texts), `scores`: the best and the worst of them, as a pair;
- `prompt`, `choices`, `answer`: the right choice and a wrong one drawn by the seed, as a pair: a
  programmatic preference that needs no judge.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deltaloom.core.errors import InputError

if TYPE_CHECKING:
    from deltaloom.core.examples import Example, Examples

Text = str | list[dict[str, str]]
"""A text, or messages."""
LABELS = {True: True, False: False, "true": True, "false": False}
"""1 and 0 are equal to true and false; CSV knows texts only."""


@dataclass(frozen=True)
class Pair:
    """Two answers to a prompt, the better one first."""

    where: str
    prompt: Text
    chosen: Text
    rejected: Text


@dataclass(frozen=True)
class Judged:
    """One answer to a prompt, desirable or not."""

    where: str
    prompt: Text
    completion: Text
    label: bool


def read(data: Examples, seed: int) -> tuple[list[Pair], list[Judged]]:
    """Pairs and single answers, in the order of the rows; raises InputError naming a bad row."""
    if not len(data):
        raise InputError(f"{data.name}: holds no rows to tune on")
    found = [_preference(row, seed) for row in data]
    pairs = [one for one in found if isinstance(one, Pair)]
    return pairs, [one for one in found if isinstance(one, Judged)]


def unpaired(pairs: Sequence[Pair], judged: Sequence[Judged]) -> Iterator[Judged]:
    """Every answer with its label."""
    for pair in pairs:
        yield Judged(pair.where, pair.prompt, pair.chosen, True)
        yield Judged(pair.where, pair.prompt, pair.rejected, False)
    yield from judged


def _preference(row: Example, seed: int) -> Pair | Judged:
    extra = row.extra
    if "chosen" in extra or "rejected" in extra:
        return _given(row)
    if "label" in extra:
        return _judged(row)
    if "candidates" in extra:
        return _best_and_worst(row)
    if row.choices and row.answers:
        return _right_and_wrong(row, seed)
    raise InputError(
        f"{row.where}: says no preference; give 'chosen' and 'rejected', 'completion' and 'label', "
        "'candidates' and 'scores', or 'choices' and 'answer'"
    )


def _prompt(row: Example) -> Text:
    """What is answered, without an answer that the row may have."""
    if row.messages is not None:
        turns = [dict(turn) for turn in row.messages]
        if not turns or turns[-1]["role"] == "assistant":
            raise InputError(f"{row.where}: the prompt must end with a message of the user's")
        return turns
    if not (row.prompt or "").strip():
        raise InputError(f"{row.where}: has no 'prompt' that the answers are to")
    return str(row.prompt)


def _given(row: Example) -> Pair:
    found = []
    for key in ("chosen", "rejected"):
        if key not in row.extra:
            raise InputError(f"{row.where}: {key!r} is missing beside its counterpart")
        found.append(_answer(row, key, row.extra[key]))
    prompt = _prompt(row)
    if isinstance(found[0], list) and isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(prompt, list) and isinstance(found[0], str):
        found = [[{"role": "assistant", "content": str(one)}] for one in found]
    return _pair(row, prompt, found[0], found[1])


def _answer(row: Example, key: str, value: Any) -> Text:
    """A text, or the assistant's messages after the prompt."""
    if isinstance(value, str):
        if not value.strip():
            raise InputError(f"{row.where}: {key!r} is empty; write an answer or remove the row")
        return value
    if not isinstance(value, list) or not value:
        raise InputError(f"{row.where}: {key!r} must be a text or a list of messages")
    turns = []
    for number, turn in enumerate(value, 1):
        if not isinstance(turn, dict) or not all(
            isinstance(turn.get(part), str) for part in ("role", "content")
        ):
            raise InputError(
                f"{row.where}: message {number} of {key!r} needs 'role' and 'content' as texts"
            )
        turns.append({"role": turn["role"], "content": turn["content"]})
    if row.messages is not None:
        start = [dict(turn) for turn in row.messages]
    else:
        start = [{"role": "user", "content": str(row.prompt)}]
    if turns[: len(start)] == start:
        turns = turns[len(start) :]
    if not turns or turns[0]["role"] != "assistant" or not turns[-1]["content"].strip():
        raise InputError(
            f"{row.where}: {key!r} does not answer the prompt with an assistant's turn"
        )
    return turns


def _judged(row: Example) -> Judged:
    label = row.extra["label"]
    if not isinstance(label, str | bool | int) or label not in LABELS:
        raise InputError(f"{row.where}: 'label' is {label!r}; it must be true or false")
    if row.messages is None:
        if not (row.completion or "").strip():
            raise InputError(f"{row.where}: has a 'label' and no 'completion' that it is of")
        return Judged(row.where, _prompt(row), str(row.completion), LABELS[label])
    turns = [dict(turn) for turn in row.messages]
    if len(turns) < 2 or turns[-1]["role"] != "assistant":
        raise InputError(f"{row.where}: a labelled conversation must end with the assistant's turn")
    return Judged(row.where, turns[:-1], turns[-1:], LABELS[label])


def _best_and_worst(row: Example) -> Pair:
    texts, scores = row.extra["candidates"], row.extra.get("scores")
    if not isinstance(texts, list) or len(texts) < 2 or not all(isinstance(t, str) for t in texts):
        raise InputError(f"{row.where}: 'candidates' must be a list of at least two texts")
    if not isinstance(scores, list) or len(scores) != len(texts) or not all(map(_number, scores)):
        raise InputError(f"{row.where}: 'scores' must be a number for each of 'candidates'")
    if max(scores) == min(scores):
        raise InputError(
            f"{row.where}: all scores are {scores[0]}: no candidate is better; remove the row"
        )
    best, worst = texts[scores.index(max(scores))], texts[scores.index(min(scores))]
    answers = [_answer(row, "candidates", text) for text in (best, worst)]
    prompt = _prompt(row)
    if isinstance(prompt, list):
        answers = [[{"role": "assistant", "content": str(one)}] for one in answers]
    return _pair(row, prompt, *answers)


def _right_and_wrong(row: Example, seed: int) -> Pair:
    assert row.choices is not None
    assert row.answers is not None
    wrong = [choice for choice in row.choices if choice not in row.answers]
    if not wrong:
        raise InputError(f"{row.where}: every choice is an answer; there is nothing to reject")
    other = random.Random(f"preference {seed} {row.id}").choice(wrong)
    return _pair(row, _prompt(row), row.answers[0], other)


def _pair(row: Example, prompt: Text, chosen: Text, rejected: Text) -> Pair:
    if type(chosen) is not type(rejected):
        raise InputError(f"{row.where}: 'chosen' and 'rejected' must both be texts or messages")
    if chosen == rejected:
        raise InputError(f"{row.where}: 'chosen' and 'rejected' are the same; remove the row")
    return Pair(row.where, prompt, chosen, rejected)


def _number(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value)
