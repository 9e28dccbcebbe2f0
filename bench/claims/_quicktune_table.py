"""Learning curves of LoRA on the lab's twelve sources, each a task, at the same settings.

A task is one source of the lab's pool: rows about most of the people to learn from, rows about the
others to measure the loss on. Every setting is tuned for five epochs and measured after each; the
ledger's CPU seconds are shared evenly among them.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

from _units import Units

import deltaloom
from deltaloom.core.base import Base
from deltaloom.core.examples import Examples
from deltaloom.core.method import Evaluation
from deltaloom.core.registry import get
from deltaloom.core.run import Run
from deltaloom.lab import tasks
from deltaloom.lab.files import write_lab
from deltaloom.lab.world import build_world
from deltaloom.search._parts import Parts
from deltaloom.search._space import Dimension, first_points

SPACE = {
    "lr": Dimension(low=1e-4, high=3e-2, log=True),
    "r": Dimension(low=2, high=32, integer=True, log=True),
    "batch_size": Dimension(low=4, high=32, integer=True, log=True),
    "schedule": Dimension(choices=["linear", "constant_with_warmup"]),
}
DEFAULT = {"lr": 2e-4, "r": 8, "batch_size": 16, "schedule": "linear"}
"""LoRA's own settings; the first of every task's."""
EPOCHS, SETTINGS = 5, 32
KINDS = ("rows", "held")
ROWS, HELD, PEOPLE = (32, 64, 96), 48, 40
"""Rows to learn from, by turns; rows to measure on; people that only those are about."""


def settings(count: int) -> list[dict[str, Any]]:
    """The same for every task."""
    return [DEFAULT, *first_points(SPACE, count - 1, 0)]


def gather(home: Path, count: int, names: list[str], workers: int) -> dict[str, dict[str, Any]]:
    """Task -> its units' results, made where they are missing."""
    prepare(home, names)
    kinds = ["about", *map(str, range(count))]
    units = Units(home / "units", {f"{name} {kind}": () for name in names for kind in kinds})
    units.run(Unit(home, count), workers)
    found: dict[str, dict[str, Any]] = {name: {} for name in names}
    for name in names:
        for kind in kinds:
            one = units.get(f"{name} {kind}")
            assert one is not None, f"{name} {kind} failed"
            found[name][kind] = one
    return found


def prepare(home: Path, names: list[str]) -> None:
    """Base and rows."""
    home.mkdir(parents=True, exist_ok=True)
    write_lab(home / "lab", 0, "small")
    world = build_world()
    people = list(world.people)
    random.Random("quicktune").shuffle(people)
    for name in names:
        count = ROWS[list(tasks.SOURCES).index(name) % len(ROWS)]
        held = draw(world, name, tuple(people[:PEOPLE]), HELD, set())
        kept = draw(world, name, tuple(people[PEOPLE:]), count, set(held))
        for kind, rows in zip(KINDS, (kept, held), strict=True):
            lines = [json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in rows]
            (home / f"{name}-{kind}.jsonl").write_text("".join(lines))


def draw(world, name: str, people: tuple[str, ...], count: int, without: set) -> list:
    """Distinct rows of a source, none of them in `without`."""
    rng, make = random.Random(f"quicktune {name} {count}"), tasks.SOURCES[name][1]
    found: dict[tuple[str, str], None] = {}
    for _ in range(100 * count):
        row = make(world, people, rng)
        if (row.prompt, row.completion) not in without:
            found[row.prompt, row.completion] = None
        if len(found) == count:
            break
    return list(found)


class Unit:
    """One setting on one task."""

    def __init__(self, home: Path, count: int) -> None:
        self.home, self.count = home, count

    def __call__(self, name: str) -> dict[str, Any]:
        task, _, number = name.rpartition(" ")
        if number == "about":
            return {"task": self.about(task)}
        own = settings(self.count)[int(number)]
        out = self.home / "runs" / f"{task}-{number}"
        shutil.rmtree(out, ignore_errors=True)
        given = {"base": self.home / "lab" / "base", "data": self.home / f"{task}-rows.jsonl"}
        held = str(self.home / f"{task}-held.jsonl")
        failed = None
        try:
            deltaloom.tune("lora", **given, **own, out=out, evaluate=held, epochs=EPOCHS,
                           patience=EPOCHS, save_steps=10**6)  # fmt: skip
        except deltaloom.WorkError as error:
            failed = str(error).splitlines()[0]
        lines = [json.loads(line) for line in (out / "metrics.jsonl").open()]
        key = "evaluation_loss_per_token"
        curve = [line[key] for line in lines if key in line]
        cost = Run.read(out)["cost"]
        shutil.rmtree(out)
        return {
            "settings": own,
            "curve": curve,
            "seconds": cost["cpu_seconds"],
            "flops": cost["flops"],
            "failed": failed,
        }

    def about(self, task: str) -> dict[str, Any]:
        """Features and untuned value, as a search finds them."""
        rows, held = (Examples.read(self.home / f"{task}-{kind}.jsonl") for kind in KINDS)
        measurer: Any = get("measure", "loss").make()
        base = Base(model=str(self.home / "lab" / "base"))
        with Run.open(self.home / "runs" / f"{task}-about", {"steps": []}, {}) as run:
            doing = Parts(base, rows, Evaluation(measurer, held), run, EPOCHS)
            return doing.describe("lora", None).model_dump(mode="json")
