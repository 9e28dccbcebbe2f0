"""AutoPEFT's front against one kind of module alone, and against random search at equal trials.

    python bench/claims/autopeft.py [--quick] [--seeds N] [--first N] [--work DIR]

The lab's base is tuned on questions of all three targets. `search` is what `search autopeft` does
in `TRIALS` trials; `random` tries as many configurations drawn uniformly from the same space; each
default is one kind of module on all layers at `SIZES` (LoRA at queries and values). Every arm's
front is taken by the loss on validation people and its hypervolume by the loss on test people: the
area between the points (loss, log2 of 1 + parameters) and the reference, which is the base's loss
and `MOST`, as a share of that rectangle. Each seed draws other people, rows and orders; differences
are taken within a seed, intervals are Student's t over seeds.
"""

from __future__ import annotations

import random
import shutil
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
from deltaloom.search._front import hypervolume, pareto
from deltaloom.search._mixtures import GOAL, KINDS, SIZE, Attempt, configuration, measured
from deltaloom.search._study import Outcome, Study
from deltaloom.search.autopeft import Autopeft

TRIALS = 24
SIZES = (1, 4, 16, 64)
MOST = 18.0
"""log2 of more parameters than any configuration has that is worth a look."""
TUNE = {"lr": 2e-2, "epochs": 4.0, "batch_size": 16}
"""One learning rate for all: of 5e-3 and 2e-2 the better one for the defaults, on seed 0, which is
none of the claim's."""
UNTOUCHED = "untouched"
ARMS = {
    "search": "search autopeft",
    "random": "random search",
    "defaults": "all four defaults together",
    "lora": "LoRA",
    "serial": "serial adapter",
    "parallel": "parallel adapter",
    "prefix": "prefix",
}


@dataclass(frozen=True)
class Tried(Attempt):
    """Also measured on rows that decide nothing."""

    outer: Evaluation

    def __call__(self, settings: dict[str, Any], part: Run) -> Outcome:
        found = super().__call__(settings, part)
        on = configuration(settings) is not None
        model = load(self.home / part.folder.name, self.base).apply(self.base) if on else None
        value = measured(model or self.base.load(), self.base, self.outer, part)
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


def one_seed(folder: Path, seed: int, quick: bool) -> dict[str, Any]:
    """Share of the rectangle that each arm's front holds, and the fronts."""
    base = Base(model=str(write_lab(folder / "lab", seed, size="small")["base"]))
    people = tasks.split_people(build_world(), seed)
    learned, tested = (people.pool[:8], people.test[:4]) if quick else (people.pool, people.test)
    data = rows(learned, 1, seed, "train")
    loss: Any = get("measure", "loss").make({})
    inner = Evaluation(loss, rows(people.target, 2, seed, "valid"))
    outer = Evaluation(loss, rows(tested, 1, seed, "test"))
    trials = 4 if quick else TRIALS
    method = Autopeft.parse({**TUNE, "trials": trials}, "search autopeft")
    space = method._space(base.config()["num_hidden_layers"])
    chance = random.Random(seed)
    drawn = [{name: one.at(chance.random()) for name, one in space.items()} for _ in range(trials)]
    layers = {name: 1 for name in space if name.startswith("layer_")}
    fixed = [
        {**dict.fromkeys(KINDS, 0), kind: size.bit_length(), **layers}
        for kind in ("lora", "serial", "parallel", "prefix")
        for size in (SIZES[:1] if quick else SIZES)
    ]
    found: dict[str, list[Trial]] = {}
    for arm, first in (("search", []), ("random", drawn), ("defaults", fixed)):
        with Run.open(folder / arm, {"arm": arm, "trials": trials}, {}, seed) as run:
            attempt = Tried(method, base, data, inner, run.work / "adapters", outer)
            count = len(first) or trials
            goals = {GOAL: "lower", SIZE: "lower"}
            study = Study(run, space, goals, count, first=first)
            found[arm] = list(study.explore(attempt))
            seconds = run.record["notes"]["trial_seconds"]
            print(f"seed {seed}, {arm}: {count} trials, {seconds:.0f} s", flush=True)
    for trial in found["defaults"]:
        (kind,) = (kind for kind in KINDS if trial.settings[kind])
        found.setdefault(kind, []).append(trial)
    with Run.open(folder / "base", {"arm": "base"}, {}, seed) as run:
        worst = measured(base.load(), base, outer, run)
    fronts = {arm: pareto(found[arm], (GOAL, SIZE)) for arm in ARMS}
    return {"seed": seed, "base": worst, "fronts": fronts,
            "area": {arm: area(front, worst) for arm, front in fronts.items()}}  # fmt: skip


def area(front: list[Trial], worst: float) -> float:
    """Share of the rectangle, by the losses on test people."""
    points = [(one.cost[UNTOUCHED], one.values[SIZE]) for one in front]
    return hypervolume(points, (worst, MOST)) / (worst * MOST)


def gains(found: list[dict[str, Any]], arm: str) -> list[float]:
    return [one["area"]["search"] - one["area"][arm] for one in found]


def tables(found: list[dict[str, Any]]) -> str:
    lines = ["| arm | trials | share of the area | search minus it | by seed |", "|---" * 5 + "|"]
    per_kind = len(SIZES)
    trials = {"search": TRIALS, "random": TRIALS, "defaults": 4 * per_kind}
    for arm, title in ARMS.items():
        own = [one["area"][arm] for one in found]
        gain = "" if arm == "search" else shown(gains(found, arm), "+")
        each = ", ".join(f"{value:.3f}" for value in own)
        lines.append(f"| {title} | {trials.get(arm, per_kind)} | {shown(own)} | {gain} | {each} |")
    first = found[0]
    lines += ["", f"The front found on seed {first['seed']} (base: {first['base']:.3f} nats)", ""]
    lines += ["| parameters | loss, test people | modules | layers |", "|---" * 4 + "|"]
    for one in first["fronts"]["search"]:
        own = configuration(one.settings) or {"layers": []}
        kinds = ", ".join(f"{kind} {own[kind]}" for kind in KINDS if own.get(kind))
        count, layers = int(one.cost.get("parameters", 0)), ", ".join(map(str, own["layers"]))
        lines.append(f"| {count:,} | {one.cost[UNTOUCHED]:.3f} | {kinds} | {layers} |")
    return "\n".join(lines) + "\n"


def judged(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Is the search's front larger than each other one?"""
    results = []
    for arm, title in ARMS.items():
        if arm == "search":
            continue
        one = over_seeds(gains(found, arm))
        low = one.value if len(found) == 1 else one.low
        unit = f"share, low end of the 95 % interval, {len(found)} seeds"
        results.append({"name": f"hypervolume, search minus {title}", "value": round(low, 4),
                        "bound": "> 0", "holds": low > 0, "unit": unit})  # fmt: skip
    return results


if __name__ == "__main__":
    run_seeds("autopeft", __doc__ or "", one_seed, tables, judged)
