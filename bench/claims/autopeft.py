"""AutoPEFT's front against one kind of module alone, and against random search at equal trials.

    python bench/claims/autopeft.py [--quick] [--seeds N] [--first N] [--work DIR]

The lab's base is tuned on questions of all three targets. `search` is what `search autopeft` does
in `TRIALS` trials; `random` tries as many configurations drawn uniformly from the same space;
`alike` begins as the search does, with each kind alone, and draws the others; each default is one
kind of module on all layers at `SIZES` (LoRA at queries and values). Every arm's front is taken by
the loss on validation people and its hypervolume by the loss on test people: the area between the
points (loss, log2 of 1 + parameters) and the reference, which is the base's loss and `MOST`, as a
share of that rectangle.

What the fronts of the first four arms consist of is then tuned again, from another seed: on the
same rows, and on `OTHER`, a task that nobody searched on; its front is taken by validation rows
and measured on test rows of that task.

Each seed draws other people, rows and orders; differences are taken within a seed, intervals are
Student's t over seeds.
"""

from __future__ import annotations

import random
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _seeds import over_seeds, run_seeds, shown

from deltaloom import Base, Examples
from deltaloom.core.delta import load
from deltaloom.core.examples import parse
from deltaloom.core.method import Evaluation, Trial
from deltaloom.core.registry import get
from deltaloom.core.run import Run
from deltaloom.lab import tasks
from deltaloom.lab.files import write_lab
from deltaloom.lab.world import build_world
from deltaloom.search._front import Goals, hypervolume, pareto
from deltaloom.search._mixtures import GOAL, KINDS, SIZE, Attempt, configuration, meaning, measured
from deltaloom.search._space import Dimension
from deltaloom.search._study import Outcome, Study
from deltaloom.search.autopeft import Autopeft

TRIALS = 60
SIZES = (1, 4, 16, 64)
MOST = 18.0
"""log2 of more parameters than any configuration has that is worth a look."""
TUNE = {"lr": 2e-2, "epochs": 4.0, "batch_size": 16}
"""One learning rate for all: of 5e-3 and 2e-2 the better one for the defaults, on seed 0, which is
none of the claim's."""
OTHER, OTHER_ROWS = "almanac", (90, 60, 90)
"""The lab's source that states facts and asks nothing, and how many of its rows each use has."""
UNTOUCHED = "untouched"
WHOLE = {
    "search": "search autopeft",
    "random": "random search",
    "alike": "random search, begun alike",
    "defaults": "all four defaults together",
}
DEFAULTS = {
    "lora": "LoRA",
    "serial": "serial adapter",
    "parallel": "parallel adapter",
    "prefix": "prefix",
}
ARMS = {**WHOLE, **DEFAULTS}
AGAIN = {"same": "the same task", "other": "another task"}
AFRESH = 1000
"""Added to the seed when a front is tuned again."""

Rows = list[Examples]
"""To learn from, to choose by, to measure on."""


@dataclass(frozen=True)
class Tried(Attempt):
    """Also measured on rows that decide nothing."""

    outer: Evaluation

    def __call__(self, settings: dict[str, Any], part: Run) -> Outcome:
        found = super().__call__(settings, part)
        model = load(self.home / part.folder.name, self.base).apply(self.base)
        value = measured(model, self.base, self.outer, part)
        shutil.rmtree(self.home / part.folder.name, ignore_errors=True)
        return Outcome(found.values, {**found.cost, UNTOUCHED: value})


def rows(people: tuple[str, ...], each: int, seed: int, name: str) -> Examples:
    """Questions of the three targets about `people`, with their answers."""
    records = [
        {"id": f"{task}-{row['id']}", "prompt": row["prompt"],
         "completion": row["choices"][row["answer"]]}
        for task in tasks.TARGETS
        for row in tasks.test_records(build_world(), people, task, each, seed)
    ]  # fmt: skip
    return Examples([parse(name, name, row) for row in records], name)


def other_rows(seed: int) -> Rows:
    """Distinct rows of the other task."""
    rng, make, world = random.Random(f"other {seed}"), tasks.SOURCES[OTHER][1], build_world()
    drawn: dict[tuple[str, str], None] = {}
    while len(drawn) < sum(OTHER_ROWS):
        row = make(world, tuple(world.people), rng)
        drawn[row.prompt, row.completion] = None
    left, found = iter(drawn), []
    for name, count in zip(("train", "valid", "test"), OTHER_ROWS, strict=True):
        pairs = [next(left) for _ in range(count)]
        records = [{"id": f"{k}", "prompt": p, "completion": c} for k, (p, c) in enumerate(pairs)]
        found.append(Examples([parse(name, name, row) for row in records], name))
    return found


@dataclass(frozen=True)
class Bench:
    """Where one seed's arms try: their base, settings and folder."""

    folder: Path
    base: Base
    method: Autopeft
    space: dict[str, Dimension]

    def tried(self, name: str, first: list[dict], count: int, rows: Rows, seed: int) -> list[Trial]:
        """`count` trials on `rows`: those of `first`, then what the search proposes."""
        goals: Goals = {GOAL: "lower", SIZE: "lower"}
        with Run.open(self.folder / name, {"arm": name, "trials": count}, {}, seed) as run:
            home, (inner, outer) = run.work / "adapters", map(evaluation, rows[1:])
            attempt = Tried(self.method, self.base, rows[0], inner, home, outer)
            study = Study(run, self.space, goals, count, first=first, meaning=meaning)
            trials = list(study.explore(attempt))
            seconds = run.record["notes"]["trial_seconds"]
            print(f"seed {seed}, {name}: {count} trials, {seconds:.0f} s", file=sys.stderr)
        return trials

    def untuned(self, name: str, rows: Rows, seed: int) -> float:
        """The base's loss on the rows to measure on."""
        with Run.open(self.folder / name, {"arm": name}, {}, seed) as run:
            return measured(self.base.load(), self.base, evaluation(rows[2]), run)


def evaluation(rows: Examples) -> Evaluation:
    loss: Any = get("measure", "loss").make({})
    return Evaluation(loss, rows)


def uniformly(space: dict[str, Dimension], count: int, seed: int) -> list[dict[str, Any]]:
    """Distinct configurations, each as likely as any."""
    chance, found = random.Random(seed), dict[str, dict[str, Any]]()
    while len(found) < count:
        drawn = {name: one.at(chance.random()) for name, one in space.items()}
        name = meaning(drawn)
        if name is not None:
            found.setdefault(name, drawn)
    return list(found.values())


def one_seed(folder: Path, seed: int, quick: bool) -> dict[str, Any]:
    """Share of the rectangle that each arm's front holds, and the fronts."""
    base = Base(model=str(write_lab(folder / "lab", seed, size="small")["base"]))
    people = tasks.split_people(build_world(), seed)
    learned, tested = (people.pool[:8], people.test[:4]) if quick else (people.pool, people.test)
    asked = (("train", learned, 1), ("valid", people.target, 2), ("test", tested, 1))
    same = [rows(who, each, seed, name) for name, who, each in asked]
    trials, sizes = (4, SIZES[:1]) if quick else (TRIALS, SIZES)
    method = Autopeft.parse({**TUNE, "trials": trials}, "search autopeft")
    space = method._space(base.config()["num_hidden_layers"])
    alone = method._alone(space)
    layers = {name: 1 for name in space if name.startswith("layer_")}
    one_kind = {**dict.fromkeys(KINDS, 0), **layers}
    fixed = [{**one_kind, kind: size.bit_length()} for kind in DEFAULTS for size in sizes]
    bench = Bench(folder, base, method, space)
    found = {
        "search": bench.tried("search", alone, trials, same, seed),
        "random": bench.tried("random", uniformly(space, trials, seed), trials, same, seed),
        "defaults": bench.tried("defaults", fixed, len(fixed), same, seed),
    }
    found["alike"] = found["search"][: len(alone)] + found["random"][: trials - len(alone)]
    for kind in DEFAULTS:
        found[kind] = [trial for trial in found["defaults"] if trial.settings[kind]]
    fronts = {arm: pareto(found[arm], (GOAL, SIZE)) for arm in ARMS}
    worst = bench.untuned("base-same", same, seed)
    again = {}
    for name, data in (("same", same), ("other", other_rows(seed))):
        own_worst = bench.untuned(f"base-{name}", data, seed)
        for arm in WHOLE:
            own = [trial.settings for trial in fronts[arm]]
            retuned = bench.tried(f"{arm}-{name}", own, len(own), data, seed + AFRESH)
            again[f"{arm} {name}"] = area(pareto(retuned, (GOAL, SIZE)), own_worst)
    return {"seed": seed, "base": worst, "fronts": fronts, "again": again,
            "area": {arm: area(front, worst) for arm, front in fronts.items()}}  # fmt: skip


def area(front: list[Trial], worst: float) -> float:
    """Share of the rectangle, by the losses on test people."""
    points = [(one.cost[UNTOUCHED], one.values[SIZE]) for one in front]
    return hypervolume(points, (worst, MOST)) / (worst * MOST)


def gains(found: list[dict[str, Any]], arm: str, of: str = "") -> list[float]:
    """The search's area minus the arm's, by seed; with `of`, of fronts tuned again on that task."""
    if of:
        return [one["again"][f"search {of}"] - one["again"][f"{arm} {of}"] for one in found]
    return [one["area"]["search"] - one["area"][arm] for one in found]


def tables(found: list[dict[str, Any]]) -> str:
    lines = ["| arm | trials | share of the area | search minus it | by seed |"]
    lines += ["|---" * 5 + "|"]
    per_kind = len(SIZES)
    trials = {**dict.fromkeys(WHOLE, TRIALS), "defaults": 4 * per_kind}
    for arm, title in ARMS.items():
        own = [one["area"][arm] for one in found]
        gain = "" if arm == "search" else shown(gains(found, arm), "+")
        each = ", ".join(f"{value:.3f}" for value in own)
        lines.append(f"| {title} | {trials.get(arm, per_kind)} | {shown(own)} | {gain} | {each} |")
    lines += ["", "Fronts tuned again", "", "| arm | task | share of the area | search minus it |"]
    lines += ["|---" * 4 + "|"]
    for of, task in AGAIN.items():
        for arm, title in WHOLE.items():
            own = [one["again"][f"{arm} {of}"] for one in found]
            gain = "" if arm == "search" else shown(gains(found, arm, of), "+")
            lines.append(f"| {title} | {task} | {shown(own)} | {gain} |")
    first = found[0]
    lines += ["", f"The front found on seed {first['seed']} (base: {first['base']:.3f} nats)", ""]
    lines += ["| parameters | loss, test people | modules | layers |", "|---" * 4 + "|"]
    for one in first["fronts"]["search"]:
        own = configuration(one.settings)
        assert own is not None
        kinds = ", ".join(f"{kind} {own[kind]}" for kind in KINDS if own.get(kind))
        count, layers = int(one.cost.get("parameters", 0)), ", ".join(map(str, own["layers"]))
        lines.append(f"| {count:,} | {one.cost[UNTOUCHED]:.3f} | {kinds} | {layers} |")
    return "\n".join(lines) + "\n"


def judged(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Is the search's front larger than each other one, also when it is tuned again?"""
    asked = [(arm, "", title) for arm, title in ARMS.items()]
    asked += [(arm, of, f"{title}, tuned again on {task}")
              for of, task in AGAIN.items() for arm, title in WHOLE.items()]  # fmt: skip
    results = []
    for arm, of, title in asked:
        if arm == "search":
            continue
        one = over_seeds(gains(found, arm, of))
        low = one.value if len(found) == 1 else one.low
        unit = f"share, low end of the 95 % interval, {len(found)} seeds"
        results.append({"name": f"hypervolume, search minus {title}", "value": round(low, 4),
                        "bound": "> 0", "holds": low > 0, "unit": unit})  # fmt: skip
    return results


if __name__ == "__main__":
    run_seeds("autopeft", __doc__ or "", one_seed, tables, judged)
