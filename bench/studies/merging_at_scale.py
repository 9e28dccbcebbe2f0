"""What matters when merging at scale: methods x experts x base size x base quality on the lab.

    python bench/studies/merging_at_scale.py --data DIR        only write the lab's files
    python bench/studies/merging_at_scale.py [--quick] [--work DIR] [--jobs N]

`recipes/merging_at_scale.yaml` is one cell of the grid. This script makes of its steps one recipe
per base: an expert for each of eight tasks, one model trained on all of them, and merges of 2, 4,
6 and 8 experts, chosen `CHOICES` times, by every method. Held-in scores are divided by the task's
own expert's, held-out ones by the base's, as Yadav et al. do (arXiv 2410.03617); a held-out task
counts for the bases that answer it better than by chance, and a base whose experts do not all do so
has accuracies but no scores. The interval is Student's t over the choices of experts; the choice of
all eight is one and has none. The tables and curves go to `docs/studies/`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import yaml
from _merging_data import HELD_IN, HELD_OUT, build
from _merging_page import write_page

from deltaloom.core.estimate import Estimate

RECIPE = Path(__file__).parents[2] / "recipes" / "merging_at_scale.yaml"
COUNTS = (2, 4, 6, 8)
CHOICES = 4
CHANCE = 0.1
"""Of ten answers, all as frequent."""
SIZES, QUALITIES = ("small", "normal"), ("untuned", "instruct")


@dataclass(frozen=True)
class Row:
    """One cell: the normalised score of one method over the choices of experts."""

    size: str
    quality: str
    count: int
    method: str
    held_in: Estimate
    held_out: Estimate


def chosen(counts: tuple[int, ...], choices: int) -> dict[str, list[str]]:
    """Name of a choice -> its tasks; the same for every base and method."""
    found = {}
    for count in counts:
        rng, seen = random.Random(f"experts {count}"), set()
        for number in range(1 if count == len(HELD_IN) else choices):
            tasks = tuple(sorted(rng.sample(HELD_IN, count)))
            while tasks in seen:
                tasks = tuple(sorted(rng.sample(HELD_IN, count)))
            seen.add(tasks)
            found[f"{count}-{number}"] = list(tasks)
    return found


def steps_of(recipe: dict) -> dict[str, tuple[str, dict]]:
    """The steps of the recipe by name, with their verb."""
    return {one["name"]: (verb, one) for step in recipe["steps"] for verb, one in step.items()}


def grid(recipe: dict, data: Path, size: str, quality: str, choices: dict[str, list[str]]) -> dict:
    """The recipe of one base: the cell's steps, for every task and every choice of experts."""
    known = steps_of(recipe)
    base = "instruct" if quality == "instruct" else str(data / size)
    steps = []
    if quality == "instruct":
        steps.append({"tune": {**known["instruct"][1], "data": str(data / "mixture.jsonl")}})
    files = {task: str(data / f"train-{task}.jsonl") for task in HELD_IN}
    tune = {**known["multitask"][1], "base": base}
    for name, rows in [*files.items(), ("multitask", list(files.values()))]:
        steps.append({"tune": {**tune, "data": rows, "name": name}})
    measure = {"method": "choice", "base": base}
    tests = {task: str(data / f"test-{task}.jsonl") for task in (*HELD_IN, *HELD_OUT)}
    for task in HELD_IN:
        one = {**measure, "deltas": [task], "tasks": [tests[task]], "name": f"expert-{task}"}
        steps.append({"measure": one})
    whole = {**measure, "deltas": ["base", "multitask"], "tasks": [*tests.values()]}
    steps.append({"measure": {**whole, "name": "whole"}})
    merges = {name: one for name, (verb, one) in known.items() if verb == "merge"}
    for choice, tasks in choices.items():
        names = []
        for method, one in merges.items():
            names.append(f"{method}-{choice}")
            steps.append({"merge": {**one, "base": base, "deltas": tasks, "name": names[-1]}})
        own = [tests[task] for task in (*tasks, *HELD_OUT)]
        one = {**measure, "deltas": names, "tasks": own, "name": f"merged-{choice}"}
        steps.append({"measure": one})
    return {"base": str(data / size), "seed": recipe["seed"], "steps": steps}


def run(content: dict, folder: Path) -> Path:
    """`deltaloom run` in a process of its own, resumed where it stopped; its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    command = [sys.executable, "-m", "deltaloom", "run", str(file), f"out={folder / 'run'}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with open(folder / "log.txt", "a", encoding="utf-8") as log:
        subprocess.run(command, stdout=log, stderr=log, env=environment, check=True)
    return folder / "run"


def measured(folder: Path, step: str, model: str, task: str) -> Estimate:
    """What one step measured of one model on one task."""
    path = folder / step / f"{model}--test-{task}" / "estimate.json"
    return Estimate.from_json(path.read_text(encoding="utf-8"))


def accuracy(folder: Path, step: str, model: str, task: str) -> float:
    """Its value."""
    return measured(folder, step, model, task).value


def learned(folder: Path) -> bool:
    """Whether every expert of a base answers its own task better than by chance."""
    return all(measured(folder, f"expert-{task}", task, task).low > CHANCE for task in HELD_IN)


def rows_of(
    folder: Path, size: str, quality: str, methods: list[str], choices: dict[str, list[str]]
) -> list[Row]:
    """The normalised scores of one base."""
    expert = {task: accuracy(folder, f"expert-{task}", task, task) for task in HELD_IN}
    # A score over a base that only guesses would be noise.
    known = [task for task in HELD_OUT if measured(folder, "whole", "base", task).low > CHANCE]
    base = {task: accuracy(folder, "whole", "base", task) for task in known}
    found = []
    for count in sorted({len(tasks) for tasks in choices.values()}):
        own = {name: tasks for name, tasks in choices.items() if len(tasks) == count}
        for method in [*methods, "multitask", "base"]:
            inside, outside = {}, {}
            for name, tasks in own.items():
                alone = method in ("multitask", "base")
                place = ("whole", method) if alone else (f"merged-{name}", f"{method}-{name}")
                inside[name] = mean(accuracy(folder, *place, task) / expert[task] for task in tasks)
                outside[name] = mean(accuracy(folder, *place, task) / base[task] for task in known)
            scores = (
                Estimate.from_items(items, metric=metric)
                for items, metric in ((inside, "held-in"), (outside, "held-out"))
            )
            found.append(Row(size, quality, count, method, *scores))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one base, few rows; writes no page")
    parser.add_argument("--data", type=Path, help="only write the lab's files, there")
    parser.add_argument("--work", type=Path, help="folder to keep and resume the runs in")
    parser.add_argument("--jobs", type=int, default=2, help="bases at the same time (2)")
    options = parser.parse_args()
    if options.data:
        build(options.data)
        return
    work = (options.work or Path(tempfile.mkdtemp(prefix="merging-at-scale-"))).resolve()
    work.mkdir(parents=True, exist_ok=True)
    build(work / "data", options.quick)
    recipe = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    choices = chosen((2, 8) if options.quick else COUNTS, 1 if options.quick else CHOICES)
    bases = [(size, quality) for size in SIZES for quality in QUALITIES]
    bases = bases[:1] if options.quick else bases

    def one(base: tuple[str, str]) -> Path:
        return run(grid(recipe, work / "data", *base, choices), work / "-".join(base))

    with ThreadPoolExecutor(options.jobs) as pool:
        folders = dict(zip(bases, pool.map(one, bases), strict=True))
    methods = [name for name, (verb, _) in steps_of(recipe).items() if verb == "merge"]
    scored = [base for base in bases if options.quick or learned(folders[base])]
    rows = [row for base in scored for row in rows_of(folders[base], *base, methods, choices)]
    raw = {
        "-".join(base): {
            "base": {t: accuracy(folders[base], "whole", "base", t) for t in (*HELD_IN, *HELD_OUT)},
            "expert": {t: accuracy(folders[base], f"expert-{t}", t, t) for t in HELD_IN},
        }
        for base in bases
    }
    costs = [
        json.loads((f / "run.json").read_text())["cost"]["cpu_seconds"] for f in folders.values()
    ]
    for row in rows:
        print(row.size, row.quality, row.count, row.method, row.held_in, row.held_out, sep="\t")
    results = [{"name": "CPU seconds of the whole grid", "value": sum(costs), "bound": "<= 3600",
                "holds": sum(costs) <= 3600, "unit": "s on one thread"}]  # fmt: skip
    if not options.quick:
        write_page(rows, raw, sum(costs), time.strftime("%Y-%m-%d"))
    print(json.dumps({"bench": "merging_at_scale", "results": results}))


if __name__ == "__main__":
    main()
