"""Judgements: what a judge is asked and what people said, from the files that benchmarks ship.

A row is pairwise (two responses, which is better), best-of-n (right responses and wrong ones),
pointwise (one response and a number), classification (a text and its class) or an open critique
(one response and a text about it). The columns decide, and these spellings are known:

| what | columns |
|---|---|
| the instruction | `prompt`, `instruction`, `question`, `input`, `messages` |
| two responses | `output_1`, `output_2` (LLMBar); `chosen`, `rejected` (RewardBench) |
| | `response_a`, `response_b`; `answer_a`, `answer_b`; `response_1`, `response_2` |
| several responses | `chosen` and `rejected`, each a list of texts (RewardBench 2) |
| who is better | `label`, `winner` or `preference`: 1, 2, a, b, model_a, model_b, 0, tie |
| one response's number | `score`, `rating` or a number as `label` |
| classes | `choices` and `answer`; or `label` with the judge's `labels` |
| a critique | `critique` |
| further | `reference` (an answer known to be right), `subset`, `model_a` and `model_b` |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeGuard

from deltaloom.core.errors import InputError
from deltaloom.core.examples import Example, Examples

Format = Literal["pairwise", "best", "pointwise", "classification", "critique"]
PAIRS = (
    ("output_1", "output_2"),
    ("chosen", "rejected"),
    ("response_a", "response_b"),
    ("answer_a", "answer_b"),
    ("response_1", "response_2"),
)
MODELS = (
    ("model_a", "model_b"),
    ("chosen_model", "rejected_model"),
    ("model_1", "model_2"),
)
WINNERS = ("label", "winner", "preference")
SCORES = ("score", "rating", "label")
FIRST, SECOND, TIE = "A", "B", "tie"
SIDES = {
    **dict.fromkeys(("1", "a", "model_a", "output_1", "response_a", "first"), FIRST),
    **dict.fromkeys(("2", "b", "model_b", "output_2", "response_b", "second"), SECOND),
    **dict.fromkeys(("0", "tie", "c", "equal", "both", "neither", "tie (bothbad)"), TIE),
}


@dataclass(frozen=True)
class Judgement:
    """One thing to be judged."""

    id: str
    where: str
    format: Format
    instruction: str
    responses: tuple[str, ...]
    """Two, one, several of which the first `right` are right, or none where the instruction holds
    what is to be classified."""
    verdicts: tuple[str, ...]
    """What the judge may say; empty for critiques."""
    label: str | None
    """What people said, one of `verdicts` (or the critique they wrote); None if nobody has."""
    reference: str | None = None
    subset: str | None = None
    models: tuple[str, str] | None = None
    """Who wrote the two responses."""
    cluster: str | None = None
    right: int = 0
    """Of a best-of-n row, how many of the first responses are right."""


def in_ties(subset: str | None) -> bool:
    """Whether this is RewardBench 2's subset of prompts with several right answers."""
    return subset is not None and subset.lower() == "ties"


def judgements(
    data: Examples, labels: Sequence[str], ties: bool, unlabelled: bool
) -> list[Judgement]:
    """Every row as a judgement; all of one format.

    `labels` are the verdicts of pointwise and classification rows (none: those that occur), and
    `ties` allows the judge a tie. Raises InputError naming file and line for a row that is no
    judgement, whose label is none of the verdicts, or that has none and `unlabelled` is not set.
    """
    found = [read_judgement(example, labels, ties) for example in data]
    formats = {one.format: one.where for one in found}
    if len(formats) > 1:
        (first, a), (second, b) = list(formats.items())[:2]
        raise InputError(f"{a} is {first} and {b} is {second}: give one task for each format")
    if not labels:
        found = with_seen(found)
    for one in found:
        if one.label is None and not unlabelled:
            raise InputError(
                f"{one.where}: has no label ({columns(one.format)}); add it, or set "
                "unlabelled=correct to judge such rows and correct for the judge's errors"
            )
    return found


def columns(format: Format) -> str:
    """Where the label of a row of this format is looked for."""
    return {
        "pairwise": "'label', 'winner' or 'preference'",
        "best": "'chosen' and 'rejected'",
        "pointwise": "'score', 'rating' or 'label'",
        "classification": "'answer' or 'label'",
        "critique": "'critique'",
    }[format]


def read_judgement(example: Example, labels: Sequence[str], ties: bool) -> Judgement:
    """One row as a judgement; `verdicts` is empty where neither it nor `labels` says them."""
    row = example.extra
    shared: dict[str, Any] = {
        "id": example.id,
        "where": example.where,
        "instruction": _instruction(example),
        "reference": _text(example, row, "reference"),
        "subset": None if row.get("subset") is None else str(row["subset"]),
        "cluster": example.cluster,
    }
    sides = next((pair for pair in PAIRS if pair[0] in row or pair[1] in row), None)
    if sides == ("chosen", "rejected") and _is_texts(row.get("chosen")):
        return _best(example, shared)
    if sides is not None:
        return _pairwise(example, sides, ties, shared)
    response = _response(example)
    if "critique" in row:
        critique = _text(example, row, "critique")
        return Judgement(
            format="critique", responses=response, verdicts=(), label=critique, **shared
        )
    if example.choices is not None:
        answer = example.answers[0] if example.answers else None
        verdicts = tuple(choice.strip() for choice in example.choices)
        return Judgement(
            format="classification",
            responses=(),
            verdicts=verdicts,
            label=None if answer is None else answer.strip(),
            **shared,
        )
    given = next((row[name] for name in SCORES if row.get(name) is not None), None)
    if response and (is_number(given) or (given is None and all(map(is_number, labels)))):
        label = None if given is None else number(given)
        return Judgement(
            format="pointwise", responses=response, verdicts=tuple(labels), label=label, **shared
        )
    label = example.answers[0] if example.answers else given
    return Judgement(
        format="classification",
        responses=response,
        verdicts=tuple(labels),
        label=None if label is None else str(label).strip(),
        **shared,
    )


def _pairwise(
    example: Example, sides: tuple[str, str], ties: bool, shared: dict[str, Any]
) -> Judgement:
    row = example.extra
    responses = tuple(_side(example, row, name) for name in sides)
    given = next((row[name] for name in WINNERS if row.get(name) is not None), None)
    if given is None and example.answers:
        given = example.answers[0]
    if given is None and sides == ("chosen", "rejected"):
        given = FIRST
    label = None
    if given is not None:
        label = SIDES.get(str(given).strip().lower())
        if label is None:
            raise InputError(
                f"{example.where}: label {given!r}: say 1 or 2 (a or b) for the better response, "
                "or tie"
            )
    models = next(((row[a], row[b]) for a, b in MODELS if row.get(a) and row.get(b)), None)
    return Judgement(
        format="pairwise",
        responses=responses,
        verdicts=(FIRST, SECOND, TIE) if ties else (FIRST, SECOND),
        label=label,
        models=None if models is None else (str(models[0]), str(models[1])),
        **shared,
    )


def _best(example: Example, shared: dict[str, Any]) -> Judgement:
    """Right responses and wrong ones, as RewardBench 2 has them."""
    chosen, rejected = example.extra["chosen"], example.extra.get("rejected")
    if not _is_texts(rejected):
        raise InputError(f"{example.where}: 'rejected' must be a list of texts, as 'chosen' is")
    if in_ties(shared["subset"]):
        kind, _, prompt = example.id.partition(":")
        if kind not in ("ref", "tied") or not prompt or (kind == "tied" and len(chosen) < 2):
            raise InputError(
                f"{example.where}: id {example.id!r}: rows of the subset Ties are called ref:N, or "
                "tied:N with two or more 'chosen'"
            )
    return Judgement(
        format="best",
        responses=(*chosen, *rejected),
        verdicts=("right", "wrong"),
        label="right",
        right=len(chosen),
        **shared,
    )


def _is_texts(value: Any) -> TypeGuard[list[str]]:
    return isinstance(value, list) and bool(value) and all(isinstance(one, str) for one in value)


def with_seen(found: list[Judgement]) -> list[Judgement]:
    """Judgements whose verdicts are the labels that occur, where the rows do not list them."""
    seen = {one.label for one in found if not one.verdicts and one.label is not None}
    if any(not one.verdicts and one.format == "pointwise" for one in found):
        verdicts = tuple(sorted(seen, key=float))
    else:
        verdicts = tuple(sorted(seen))
    found = [
        replace(one, verdicts=verdicts) if not one.verdicts and one.format != "critique" else one
        for one in found
    ]
    short = next((one for one in found if one.format != "critique" and len(one.verdicts) < 2), None)
    if short is not None:
        raise InputError(
            f"{short.where}: only {list(short.verdicts)} occurs as a label; name all that a judge "
            "may say in labels="
        )
    return found


def number(given: Any) -> str:
    """A score as it is written: `4`, `4.5`."""
    value = float(given)
    return str(int(value)) if value.is_integer() else str(value)


def is_number(given: Any) -> bool:
    """Whether it is a number, or is written like one."""
    try:
        float(given)
    except (TypeError, ValueError):
        return False
    return not isinstance(given, bool)


def _instruction(example: Example) -> str:
    if example.messages is not None:
        turns = list(example.messages)
        if turns[-1]["role"] == "assistant":
            turns.pop()
        if len(turns) == 1:
            return turns[0]["content"]
        return "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)
    text = example.prompt if example.prompt is not None else example.text
    if text is None:
        raise InputError(f"{example.where}: has no 'prompt' that the judgement is about")
    return text


def _response(example: Example) -> tuple[str, ...]:
    if example.completion is not None:
        return (example.completion,)
    if example.messages is not None and example.messages[-1]["role"] == "assistant":
        return (example.messages[-1]["content"],)
    return ()


def _side(example: Example, row: dict[str, Any], name: str) -> str:
    value = row.get(name)
    if isinstance(value, list) and value and isinstance(value[-1], dict):
        value = value[-1].get("content")  # a conversation that ends in the response
    if not isinstance(value, str):
        raise InputError(f"{example.where}: {name!r} must be a text, not {type(value).__name__}")
    return value


def _text(example: Example, row: dict[str, Any], name: str) -> str | None:
    value = row.get(name)
    if value is not None and not isinstance(value, str):
        raise InputError(f"{example.where}: {name!r} must be a text, not {type(value).__name__}")
    return value
