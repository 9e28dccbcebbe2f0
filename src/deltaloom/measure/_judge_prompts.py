"""What a judge reads and writes, in FLAMe's text-to-text form (Vu et al. 2024, section 3.2).

INSTRUCTIONS:
title: ...
description: ...
output_fields: ...

CONTEXT:
label: value

EVALUATION:
verdict: A
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from deltaloom.measure._judgements import FIRST, SECOND, TIE, Judgement

FIELD = "verdict"
DESCRIPTIONS = {
    "pairwise": "Which response follows the instruction better? Do not let the order or the "
    "length of the responses decide. Say {verdicts}.",
    "pointwise": "How well does the response follow the instruction? Say {verdicts}, the largest "
    "being best.",
    "classification": "Which of these is right for the text? Say {verdicts}.",
    "critique": "Say in a few sentences what is good and what is bad about the response.",
}
TITLES = {
    "pairwise": "Comparison of two responses",
    "pointwise": "Rating of a response",
    "classification": "Classification",
    "critique": "Critique of a response",
}
EMPTY = "N/A"
"""Stands for the content where only the form of the question is to be felt (Zhao et al. 2021)."""


def request(
    one: Judgement, *, swapped: bool = False, remarks: Sequence[str] = (), explain: bool = False
) -> str:
    """The prompt about one judgement; `swapped` puts the second response first.

    `remarks` stand at the end of the context, and `explain` asks for a reason before the verdict.
    """
    field = "critique" if one.format == "critique" else FIELD
    fields = f"explanation, {field}" if explain and one.format != "critique" else field
    lines = [
        "INSTRUCTIONS:",
        f"title: {TITLES[one.format]}",
        f"description: {DESCRIPTIONS[one.format].format(verdicts=_listed(one.verdicts))}",
        f"output_fields: {fields}",
        "",
        "CONTEXT:",
        f"{'text' if one.format == 'classification' else 'instruction'}: {one.instruction}",
    ]
    if one.reference is not None:
        lines.append(f"reference: {one.reference}")
    shown = one.responses[::-1] if swapped else one.responses
    names = (f"response {FIRST}", f"response {SECOND}") if len(shown) == 2 else ("response",)
    lines += [f"{name}: {text}" for name, text in zip(names, shown, strict=False)]
    lines += remarks
    return "\n".join([*lines, "", "EVALUATION:", ""])


def reply(verdict: str, field: str = FIELD) -> str:
    """What a judge answers."""
    return f"{field}: {verdict}"


def critique_in(text: str) -> str:
    """A written critique without the name of its field."""
    return re.sub(r"^\s*critique\s*:\s*", "", text, flags=re.IGNORECASE)


def seen_swapped(verdict: str) -> str:
    """A verdict about swapped responses in terms of the responses as they are."""
    return {FIRST: SECOND, SECOND: FIRST}.get(verdict, verdict)


def verdict_in(text: str, verdicts: Sequence[str]) -> str | None:
    """The verdict that a generated answer states; None where it states none, or several.

    Looked for, in this order: after the last `verdict:`, in the last double brackets (`[[A]]`, as
    MT-Bench and RewardBench ask for), and the whole answer.
    """
    pieces = [
        *re.findall(rf"{FIELD}\s*:\s*(.*)", text, re.IGNORECASE)[-1:],
        *re.findall(r"\[\[(.+?)\]\]", text)[-1:],
        text,
    ]
    for piece in pieces:
        found = _stated(piece, verdicts)
        if found is not None:
            return found
    return None


def _stated(piece: str, verdicts: Sequence[str]) -> str | None:
    plain = piece.strip().strip("[]*\"'`.").strip().lower()
    known = {verdict.lower(): verdict for verdict in verdicts}
    if TIE in known:
        known.setdefault("c", TIE)
    if plain in known:
        return known[plain]
    # "Response A is better." names one; "A is better than B" names two and states neither here.
    # A single small letter would be the article.
    found = {
        verdict
        for verdict in verdicts
        if re.search(
            rf"(?<!\w){re.escape(verdict)}(?!\w)", piece, 0 if len(verdict) == 1 else re.IGNORECASE
        )
    }
    return found.pop() if len(found) == 1 and len(piece.split()) <= 8 else None


def _listed(verdicts: Sequence[str]) -> str:
    return (
        ", ".join(verdicts[:-1]) + f" or {verdicts[-1]}" if len(verdicts) > 1 else "".join(verdicts)
    )
