"""Routed specialists against each alone, their average and their sum, little and much specialised.

    python bench/claims/route.py [--quick] [--seeds N] [--first SEED] [--work DIR]

Three LoRA specialists on the MLPs of the lab's base, one for each of its targets, tuned for few and
for many steps. Routers are trained on 32 rows a task, so two arms get the same rows: `few-rows` is
a LoRA adapter tuned on them alone, `average-tuned` one tuned on them over the average. All are
asked the questions of all three tasks about people who are in no training row. CKA of every pair is
measured on 192 other rows. The seed draws the people and the tuning; it is the random unit:
differences are taken within a seed, intervals are Student's t over seeds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import yaml
from _seeds import over_seeds, run_seeds, shown

from deltaloom.core.estimate import Estimate
from deltaloom.lab import tasks
from deltaloom.lab.files import write_lab
from deltaloom.lab.world import build_world

EPOCHS = {"few": 2, "many": 24}
"""Of 208 rows; 13 steps each."""
MLP = ["gate_proj", "up_proj", "down_proj"]
TUNE = {"method": "lora", "lr": 3e-3, "batch_size": 16, "modules": MLP}
"""The quickstart's."""
ROUTE = {"method": "route", "epochs": 16, "batch_size": 16}
MERGED = ("average", "sum", "routed")
PAIRS = list(combinations(tasks.TARGETS, 2))


def main() -> None:
    run_seeds("route", str(__doc__), one_seed, tables, judged)


def one_seed(home: Path, seed: int, quick: bool) -> dict[tuple[str, ...], float]:
    """Run it all; accuracy by ("accuracy", model, task) and CKA by ("cka", degree, pair, layer)."""
    base = write_lab(home / "lab", seed, "small" if quick else "full")["base"]
    data = rows(home / "data", seed, quick)
    asked = [data[f"test-{task}"] for task in tasks.TARGETS]
    cka = {"method": "cka", "tasks": data["held"]}
    few_rows = {**TUNE, "data": data["target"], "epochs": 8}
    steps: list[dict] = [{"tune": {**few_rows, "name": "few-rows"}}]
    models, measured = ["base", "few-rows"], []
    for degree, epochs in EPOCHS.items():
        own = {task: f"{degree}-{task}" for task in tasks.TARGETS}
        steps += [
            {"tune": {**TUNE, "name": name, "data": data[f"train-{task}"], "epochs": epochs}}
            for task, name in own.items()
        ]
        deltas = [*own.values()]
        merges = {
            "average": {"method": "average", "form": "model"},  # it is tuned on
            "sum": {"method": "task_arithmetic"},
            "routed": {**ROUTE, "data": data["target"]},
        }
        steps += [
            {"merge": {**one, "name": f"{degree}-{name}", "deltas": deltas}}
            for name, one in merges.items()
        ]
        average, tuned = f"{degree}-average", f"{degree}-average-tuned"
        steps.append({"tune": {**few_rows, "name": tuned, "base": average}})
        measured.append({"measure": {"method": "choice", "name": f"asked-{degree}", "base": average,
                                     "deltas": [tuned], "tasks": asked}})  # fmt: skip
        models += [*deltas, *(f"{degree}-{name}" for name in merges)]
        measured += [
            {"measure": {"name": f"cka-{degree}-{one}-{two}", "deltas": [own[one]],
                         "other": str(home / "run" / own[two]), **cka}}
            for one, two in PAIRS
        ]  # fmt: skip
    measured.append({"measure": {"method": "choice", "name": "asked", "deltas": models,
                                 "tasks": asked}})  # fmt: skip
    run({"base": str(base), "seed": seed, "steps": steps + measured}, home)
    return read(home / "run", models)


def rows(folder: Path, seed: int, quick: bool) -> dict[str, str]:
    """Write the data; nobody of one part is in another but for the questions and `held`."""
    world = build_world()
    split = tasks.split_people(world, seed)
    pool, tested = (split.pool[:12], split.test[:12]) if quick else (split.pool, split.test)

    def records(people: tuple[str, ...], names: tuple[str, ...]) -> list[dict]:
        return [row for n in names for row in tasks.target_records(world, people, n, seed)]

    parts = {
        "target": records(split.target, tasks.TARGETS),
        "held": records(tested[:32], tasks.TARGETS),
        **{f"train-{name}": records(pool, (name,)) for name in tasks.TARGETS},
        **{f"test-{n}": tasks.test_records(world, tested, n, 4, seed) for n in tasks.TARGETS},
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        lines = [json.dumps(row) + "\n" for row in part]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return {name: str(folder / f"{name}.jsonl") for name in parts}


def run(recipe: dict, home: Path) -> None:
    """`deltaloom run`, one thread."""
    home.mkdir(parents=True, exist_ok=True)
    path = home / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    command = [sys.executable, "-m", "deltaloom", "run", str(path), f"out={home / 'run'}"]
    subprocess.run(
        command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


def read(folder: Path, models: list[str]) -> dict[tuple[str, ...], float]:
    """See `one_seed`; `all` is the mean over tasks, pairs or blocks."""
    found: dict[tuple[str, ...], float] = {}
    steps = {model: "asked" for model in models}
    steps |= {f"{degree}-average-tuned": f"asked-{degree}" for degree in EPOCHS}
    for model, step in steps.items():
        for task in tasks.TARGETS:
            file = folder / step / f"{model}--test-{task}" / "estimate.json"
            found["accuracy", model, task] = Estimate.from_json(file.read_text()).value
        own = [found["accuracy", model, task] for task in tasks.TARGETS]
        found["accuracy", model, "all"] = sum(own) / len(own)
    for degree in EPOCHS:
        best = max(found["accuracy", f"{degree}-{task}", "all"] for task in tasks.TARGETS)
        found["accuracy", f"{degree}-best", "all"] = best
        layers: dict[str, list[float]] = {}
        for one, two in PAIRS:
            step = folder / f"cka-{degree}-{one}-{two}" / f"{degree}-{one}--held"
            record = json.loads((step / "cka.json").read_text())
            for layer in record["layers"]:
                layers.setdefault(layer["layer"], []).append(layer["cka"])
            layers.setdefault("all", []).append(record["value"])
            for key in ("cosine", "sign_conflicts", "change"):
                layers.setdefault(key, []).append(record["weights"]["all"][key])
        found |= {("cka", degree, key): sum(own) / len(own) for key, own in layers.items()}
    return found


def differences() -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
    """What is claimed or asked: name -> the two values that are subtracted."""
    asked = {}
    for degree in EPOCHS:
        mine = ("accuracy", f"{degree}-routed", "all")
        for other in ("average", "sum", "best", "average-tuned"):
            asked[f"{degree}: routed - {other}"] = mine, ("accuracy", f"{degree}-{other}", "all")
        asked[f"{degree}: routed - few-rows"] = mine, ("accuracy", "few-rows", "all")
    for name in MERGED:
        few, many = (("accuracy", f"{degree}-{name}", "all") for degree in ("few", "many"))
        asked[f"{name}: many - few"] = many, few
    asked["CKA of pairs: many - few"] = ("cka", "many", "all"), ("cka", "few", "all")
    return asked


def tables(found: list[dict[tuple[str, ...], float]]) -> str:
    """Accuracies, CKA by layer and differences."""
    lines = ["| model | union | " + " | ".join(tasks.TARGETS) + " |", "|---|---|---|---|---|"]
    models = dict.fromkeys(key[1] for key in found[0] if key[0] == "accuracy")
    for model in models:
        keys = [("accuracy", model, task) for task in tasks.TARGETS]
        parts = [
            f"{over_seeds([s[k] for s in found]).value:.3f}" if k in found[0] else "" for k in keys
        ]
        union = shown([seed["accuracy", model, "all"] for seed in found])
        lines.append(f"| {model} | {union} | {' | '.join(parts)} |")
    lines += ["", "| pairs of specialists | few | many |", "|---|---|---|"]
    names = [key[2] for key in found[0] if key[:2] == ("cka", "few")]
    for name in names:
        cells = [shown([seed["cka", degree, name] for seed in found]) for degree in EPOCHS]
        label = {"all": "CKA, mean over blocks"}.get(name, name)
        label = f"CKA, {name}" if name.startswith(("block", "embed", "norm")) else label
        lines.append(f"| {label} | {' | '.join(cells)} |")
    lines += ["", "| difference | value |", "|---|---|"]
    for name, (a, b) in differences().items():
        lines.append(f"| {name} | {shown([seed[a] - seed[b] for seed in found], '+')} |")
    return "\n".join(lines) + "\n"


def judged(found: list[dict[tuple[str, ...], float]]) -> list[dict]:
    """Does CKA fall with specialisation, and does routing keep more than averaging and summing?"""
    others = ("average", "sum", "best", "few-rows", "average-tuned")
    names = [f"{degree}: routed - {other}" for degree in EPOCHS for other in others]
    results = []
    for name in ("CKA of pairs: many - few", *names):
        a, b = differences()[name]
        one = over_seeds([seed[a] - seed[b] for seed in found])
        falls = name.startswith("CKA")
        # Of one seed there is no interval.
        end = one.value if len(found) == 1 else one.high if falls else one.low
        what = "CKA, high" if falls else "accuracy, low"
        unit = f"{what} end of the 95 % interval, {len(found)} seeds"
        results.append({"name": name, "value": round(end, 4), "bound": "< 0" if falls else "> 0",
                        "holds": end < 0 if falls else end > 0, "unit": unit})  # fmt: skip
    return results


if __name__ == "__main__":
    main()
