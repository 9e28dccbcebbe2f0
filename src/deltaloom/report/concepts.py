"""How many visual concepts fit into one image: shares by k and category, the grader, pictures."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltaloom.report import numbers
from deltaloom.report.composition import Cell, heat_cell
from deltaloom.report.judging import Cell as Rate
from deltaloom.report.judging import cell
from deltaloom.report.reading import Report, json_lines

DOCUMENT = "conceptmix.json"
SHOWN = 4
"""Pictures with full marks, and without, shown of one model; each of another k while there is."""
LARGEST = 200_000
"""Bytes of a picture that is put into the page; of a larger one the file is named."""
KINDS = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg", b"RIFF": "webp"}
"""Image type by its first bytes."""
GRADER = {
    "audit": ("error", "sensitivity", "specificity", "kappa"),
    "against_exact": ("error", "sensitivity", "specificity", "kappa"),
    "corrected": ("concept_fraction", "full_marks"),
}
NAMES = {
    "audit": "on drawn scenes",
    "against_exact": "on these images",
    "corrected": "corrected for it",
}


@dataclass(frozen=True)
class Picture:
    """One image with its prompt and the answers about it."""

    id: str
    prompt: str
    data: str | None
    """The whole image as a data URL; None where it is too large, and then `file` says where."""
    file: str
    answers: tuple[tuple[str, str], ...]
    """Question and answer."""


@dataclass(frozen=True)
class Concepts:
    """One model's ConceptMix."""

    label: str
    ks: tuple[int, ...]
    totals: tuple[tuple[str, tuple[Cell | None, ...]], ...]
    """Full marks and the concept fraction at each k."""
    rows: tuple[tuple[str, tuple[Cell | None, ...], Cell | None], ...]
    """Every category with its share of yes at each k, and over all."""
    grader: tuple[tuple[str, Rate], ...]
    """The grader's own errors, and the scores corrected for them."""
    pictures: tuple[tuple[str, tuple[Picture, ...]], ...]
    """Under a heading each."""
    problem: str | None = None


def concepts(report: Report) -> list[Concepts]:
    """Every model of every measure step that left a ConceptMix."""
    return [
        _concepts(f"{report.label(step)}: {path.parent.name.partition('--')[0]}", path)
        for step in report.of_verb("measure")
        for path in sorted(step.folder.glob(f"*--*/{DOCUMENT}"))
    ]


def _concepts(label: str, path: Path) -> Concepts:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        by_k = {int(k): marks for k, marks in document["k"].items()}
        ks = tuple(sorted(by_k))
        totals = tuple(
            (name, tuple(_heat(by_k[k].get(key)) for k in ks))
            for key, name in (("full_marks", "Full marks"), ("concept_fraction", "Concepts shown"))
        )
        rows = tuple(
            (category, tuple(_heat(by_k[k].get("categories", {}).get(category)) for k in ks),
             _heat(whole))
            for category, whole in document["categories"].items()
        )  # fmt: skip
        grader = _grader(document.get("grader") or {})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return Concepts(label, (), (), (), (), (), f"The result cannot be read: {error!r}")
    return Concepts(label, ks, totals, rows, grader, _pictures(path.parent))


def _heat(one: Any) -> Cell | None:
    return None if one is None else heat_cell(one)


def _grader(found: Mapping[str, Any]) -> tuple[tuple[str, Rate], ...]:
    cells = (
        (f"{key.replace('_', ' ')} {NAMES[part]}", cell(found.get(part, {}).get(key)))
        for part, keys in GRADER.items()
        for key in keys
    )
    return tuple((name, one) for name, one in cells if one is not None)


def _pictures(folder: Path) -> tuple[tuple[str, tuple[Picture, ...]], ...]:
    """Of those on disk and graded, some with full marks and some without, the largest k first."""
    prompts = {str(row.get("id")): row for row in json_lines(folder / "prompts.jsonl")}
    sides: dict[str, dict[int, list[tuple[str, list[Any]]]]] = {"Full marks": {}, "Not all": {}}
    for row in json_lines(folder / "answers.jsonl"):
        name, given = str(row.get("id")), row.get("answers")
        if name not in prompts or not isinstance(given, list) or not given:
            continue
        side = sides["Full marks" if all(given) else "Not all"]
        side.setdefault(len(given), []).append((name, given))
    return tuple(
        (heading, shown)
        for heading, by_k in sides.items()
        if (shown := _sample(folder / "images", by_k, prompts))
    )


def _sample(
    images: Path, by_k: Mapping[int, list[tuple[str, list[Any]]]], prompts: Mapping[str, Any]
) -> tuple[Picture, ...]:
    """The first picture of each k, then the second, while fewer than `SHOWN` are found."""
    order = sorted(
        (place, -k, name, given)
        for k, rows in by_k.items()
        for place, (name, given) in enumerate(sorted(rows, key=lambda row: row[0]))
    )
    found: list[Picture] = []
    for _, _, name, given in order:
        if len(found) == SHOWN:
            break
        path = images / f"{name}.png"
        if path.resolve().parent == images.resolve() and path.is_file():
            found.append(_picture(path, name, prompts[name], given))
    return tuple(found)


def _picture(path: Path, name: str, row: Mapping[str, Any], given: list[Any]) -> Picture:
    data = None
    if path.stat().st_size <= LARGEST:
        content = path.read_bytes()
        kind = next((kind for start, kind in KINDS.items() if content.startswith(start)), None)
        if kind is not None:
            data = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    said = ["not answered" if one is None else "yes" if one else "no" for one in given]
    questions = [str(question) for question in row.get("questions") or ()]
    return Picture(
        id=name,
        prompt=str(row.get("prompt") or ""),
        data=data,
        file=f"images/{path.name} ({numbers.size(path.stat().st_size)})",
        answers=tuple(zip(questions, said, strict=False)),
    )
