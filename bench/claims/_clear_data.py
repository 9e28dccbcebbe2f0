"""Rows with wrong labels for `clear.py`: made in the lab, injected into TREC, or left by rules."""

from __future__ import annotations

import csv
import json
import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]

NOISES: dict[str, tuple[str, float]] = {
    "none": ("symmetric", 0.0),
    "symmetric 40 %": ("symmetric", 0.4),
    "asymmetric 40 %": ("asymmetric", 0.4),
    "symmetric 60 %": ("symmetric", 0.6),
    "symmetric 20 %": ("symmetric", 0.2),
    "asymmetric 20 %": ("asymmetric", 0.2),
    "asymmetric 60 %": ("asymmetric", 0.6),
}
FOUND = "as found"
"""The noise of data whose labels were wrong before we came."""
PEOPLE, TESTED = 96, 60
"""The lab: people asked about in training and in the test."""
TREC_ROWS, VALIDATION = 1600, 500
QUESTIONS = ["description", "entity", "abbreviation", "person", "place", "number"]
"""TREC's coarse classes in the order of the file's numbers."""
MINILM = "models/all-MiniLM-L6-v2"
NEWS = {"hausa": "hausa_newsclass", "yoruba": "yoruba_newsclass"}
SETS = ("lab", "trec", *NEWS)


@dataclass(frozen=True)
class Task:
    """Rows to tune on, with right answers and with the labels they get, and rows to be asked."""

    rows: list[Row]
    labels: list[int]
    test: list[Row]

    @property
    def wrong(self) -> list[bool]:
        """Which labels are wrong."""
        return [a != row["answer"] for a, row in zip(self.labels, self.rows, strict=True)]


def noises(name: str) -> tuple[str, ...]:
    """The noises of a set."""
    return (FOUND,) if name in NEWS else tuple(NOISES)


def task(name: str, noise: str, seed: int, quick: bool) -> Task:
    """The rows of a set under a noise; the seed draws rows, questions and noise."""
    if name in NEWS:
        return _news(NEWS[name], quick)
    rows, test = _lab(seed, quick) if name == "lab" else _trec(seed, quick)
    return Task(rows, noised(rows, *NOISES[noise], seed), test)


def base(name: str, home: Path, seed: int, device: str) -> dict[str, Any]:
    """The base of a set, as settings."""
    if name == "lab":
        from deltaloom.lab.files import write_lab

        model = write_lab(home / f"lab-{seed}", seed, size="small")["base"]
        return {"model": str(model), "device": device}
    labels = QUESTIONS if name == "trec" else _classes(NEWS[name])
    return {"model": str(_assets() / MINILM), "labels": labels, "device": device}


def noised(rows: list[Row], kind: str, share: float, seed: int) -> list[int]:
    """The labels that the rows get."""
    rng = random.Random(f"noise {kind} {share} {seed}")
    labels = []
    for row in rows:
        label, classes = row["answer"], len(row["choices"])
        if rng.random() < share:
            label = rng.randrange(classes) if kind == "symmetric" else (label - 1) % classes
        labels.append(label)
    return labels


def write(path: Path, rows: list[Row], labels: list[int]) -> Path:
    """Rows with these labels, to tune on and to be asked."""
    lines = [
        {"id": r["id"], "prompt": r["prompt"], "choices": r["choices"], "answer": label}
        for r, label in zip(rows, labels, strict=True)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def _lab(seed: int, quick: bool) -> tuple[list[Row], list[Row]]:
    """Where people were born: questions about different people, three and four about each."""
    from deltaloom.lab import tasks
    from deltaloom.lab.world import build_world

    world = build_world()
    split = tasks.split_people(world, seed)
    people = split.pool[: 12 if quick else PEOPLE]
    train = tasks.test_records(world, people, "birth", 3, seed)
    return train, tasks.test_records(world, split.test[:TESTED], "birth", 4, seed)


def _trec(seed: int, quick: bool) -> tuple[list[Row], list[Row]]:
    """Questions of TREC, other ones for every seed, and its test."""
    train = random.Random(f"trec {seed}").sample(_trec_file("train"), TREC_ROWS)
    return train[: 64 if quick else None], _trec_file("test")[: 50 if quick else None]


def trec_validation(seed: int) -> list[Row]:
    """Rows of TREC's training file that this seed does not tune on."""
    taken = {row["id"] for row in _trec(seed, quick=False)[0]}
    left = [row for row in _trec_file("train") if row["id"] not in taken]
    return random.Random(f"validation {seed}").sample(left, VALIDATION)


def _trec_file(part: str) -> list[Row]:
    path = _assets() / f"data/classification_sentiment/TREC.{part}.all"
    lines = path.read_text(encoding="latin-1").splitlines()
    pairs = [(line[2:].strip(), int(line[0])) for line in lines if line.strip()]
    return _rows(f"trec-{part}", pairs, QUESTIONS)


def _news(folder: str, quick: bool) -> Task:
    """Headlines, their labels by rules and by people."""
    right, found, test = (
        _headlines(folder, part) for part in ("train_clean", "train_clean_noisy_labels", "test")
    )
    classes = _classes(folder)
    count = 64 if quick else None
    return Task(
        _rows(folder, [(text, classes.index(label)) for text, label in right[:count]], classes),
        [classes.index(label) for _, label in found[:count]],
        _rows(f"{folder}-test", [(t, classes.index(k)) for t, k in test[:count]], classes),
    )


def _classes(folder: str) -> list[str]:
    return sorted({label for _, label in _headlines(folder, "train_clean")})


def _headlines(folder: str, part: str) -> list[tuple[str, str]]:
    path = _assets() / f"data/noisy_labels_african/{folder}/{part}.tsv"
    with open(path, encoding="utf-8", newline="") as file:
        lines = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        return [(line["news_title"], line["label"]) for line in lines]


def _rows(name: str, pairs: list[tuple[str, int]], classes: list[str]) -> list[Row]:
    return [
        {"id": f"{name}-{number}", "prompt": text, "choices": classes, "answer": answer}
        for number, (text, answer) in enumerate(pairs)
    ]


def _assets() -> Path:
    return Path(os.environ["DELTALOOM_ASSETS"]).resolve()
