"""One model for many tasks: one model each, a plain mixture, filtered, three stages, on the lab.

    python bench/claims/staged.py [--quick] [--seeds N] [--first SEED] [--work DIR]

Eight tasks. Three ask for attributes and have 208 rows (`birth`, `home`, `door`), three others
have 24 (`holiday`, `boat`, `hat`). Two with 208 rows are unlike: `echo` uses the same words and
asks for the person that was named, `rumour` asks for `birth` in another scaffold and is answered
with another town. Arms: a LoRA for each task; one LoRA on all rows as they are; one on the rows
that the gradient or the transfer filter keeps; `tune staged` with its defaults but for the tuning
itself (filter, high-resource, all); the same without the filter. Joint arms see `EPOCHS` passes
over their rows, single-task models the same passes over their own or `LEAST` steps, whichever is
more. A task that an arm leaves out is answered by its single-task model, as it would be served.
Questions are about people who are in no training row. The seed draws people, rows and orders; it
is the random unit: differences are taken within a seed, intervals are Student's t over seeds.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from _seeds import over_seeds, run_seeds, shown

import deltaloom
from deltaloom.core.estimate import Estimate
from deltaloom.lab import tasks
from deltaloom.lab.files import write_lab
from deltaloom.lab.world import ATTRIBUTES, World, build_world

HIGH, LOW = ("birth", "home", "door"), ("holiday", "boat", "hat")
UNLIKE = ("echo", "rumour")
ROWS = {**dict.fromkeys(HIGH + UNLIKE, 208), **dict.fromkeys(LOW, 24)}
EPOCHS, LEAST = 8, 48
TUNE = {"lr": 3e-3, "batch_size": 16, "save_steps": 2000}
"""The quickstart's; one checkpoint is enough."""
PLAIN = {"filter": "none", "high_share": 0, "temperatures": [1.0, 1.0]}
JOINT = {
    "plain": PLAIN,
    "filtered": {**PLAIN, "filter": "gradient"},
    "filtered, transfer": {**PLAIN, "filter": "transfer"},
    "staged": {},
    "staged, no filter": {"filter": "none"},
}
ARMS = ("single", *JOINT)
FILTERS = {"filtered": "gradient", "filtered, transfer": "transfer"}
PARTS = {"all": HIGH + LOW + UNLIKE, "high": HIGH, "low": LOW, "unlike": UNLIKE}
COMPARED = (
    ("plain", "single"),
    ("filtered", "plain"),
    ("filtered, transfer", "plain"),
    ("staged", "plain"),
    ("staged", "single"),
    ("staged, no filter", "plain"),
)

Found = dict[tuple[str, str], float]


def main() -> None:
    run_seeds("staged", str(__doc__), one_seed, tables, judged)


def one_seed(home: Path, seed: int, quick: bool) -> Found:
    """Accuracy by (arm, task), models served by ("models", arm), similarity of tasks."""
    base = write_lab(home / "lab", seed, "small")["base"]
    world = build_world()
    split = tasks.split_people(world, seed)
    data, asked = {}, {}
    for task, count in ROWS.items():
        rows = questions(world, split.pool, task, count // (8 if quick else 1), seed)
        data[task] = write(home / f"{task}.jsonl", rows)
        tests = questions(world, split.test, task, 30 if quick else 180, seed, choices=True)
        asked[task] = write(home / f"test-{task}.jsonl", tests)
    shared = {"base": base, "seed": seed}
    outs: dict[str, Path] = {}
    for task, file in data.items():
        outs[task] = home / f"single-{task}"
        count = sum(1 for _ in file.open())
        epochs = 1 if quick else max(EPOCHS, LEAST * TUNE["batch_size"] / count)
        deltaloom.tune("lora", **shared, data=file, epochs=epochs, out=outs[task], **TUNE)
    for arm, how in JOINT.items():
        outs[arm] = home / arm.replace(", ", "-").replace(" ", "-")
        given = {
            **shared,
            **TUNE,
            **how,
            "data": [*data.values()],
            "epochs": 1 if quick else EPOCHS,
        }
        deltaloom.tune("staged", **given, out=outs[arm])
    names = [str(out) for out in outs.values()]
    folder = home / "asked"
    deltaloom.measure("choice", **shared, deltas=names, tasks=[*asked.values()], out=folder)
    found: Found = {}
    for task, test in asked.items():
        for arm in ("single", *JOINT):
            record = {} if arm == "single" else stages(outs[arm])
            own = arm == "single" or task in record["left_out"]
            out = outs[task] if own else outs[arm]
            text = (folder / f"{out.name}--{test.stem}" / "estimate.json").read_text()
            found[arm, task] = Estimate.from_json(text).value
            found["models", arm] = len(ROWS) if arm == "single" else 1 + len(record["left_out"])
            found["left out " + arm, task] = float(arm != "single" and own)
    for arm in FILTERS:
        similarity = stages(outs[arm])["similarity"]
        for task, own in similarity.items():
            both = [(own[other] + similarity[other][task]) / 2 for other in own]
            found["fit " + arm, task] = sum(both) / len(both)
    return found


def stages(folder: Path) -> dict:
    """What `tune staged` wrote."""
    return json.loads((folder / "stages.json").read_text())


def questions(
    world: World, people: tuple[str, ...], task: str, count: int, seed: int, choices: bool = False
) -> list[dict]:
    """`count` questions about `people`, everybody in turn, with answers or choices."""
    rng = random.Random(f"staged {task} {seed} {choices}")
    rows = []
    for number in range(count):
        name = people[number % len(people)]
        attribute = rng.choice(tasks.TARGETS) if task == "echo" else task
        attribute = "birth" if task == "rumour" else attribute
        opener, verb = rng.choice(tasks.OPENERS), rng.choice(tasks.VERBS[attribute])
        form = rng.choice(tasks.ECHO) if task == "echo" else tasks.SURVEY
        form = tasks.FORM if task == "rumour" else form
        others = [one for one in people if one != name]
        kind = ATTRIBUTES[attribute].kind
        prompt = form.format(
            opener=opener, verb=verb, kind=kind, name=name, other=rng.choice(others)
        )
        answer = name if task == "echo" else world.facts[name][attribute]
        answer = world.facts[name]["home"] if task == "rumour" else answer
        row = {"id": f"{task}-{number}", "source": task, "prompt": prompt}
        if choices:
            wrong = rng.sample(others, 9) if task == "echo" else ATTRIBUTES[attribute].values
            texts = sorted({answer, *wrong})
            row |= {"cluster": name, "choices": [f" {one}" for one in texts]}
            rows.append({**row, "answer": texts.index(answer)})
        else:
            rows.append({**row, "completion": f" {answer}"})
    return rows


def write(path: Path, rows: list[dict]) -> Path:
    """One JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def over(seed: Found, arm: str, part: str) -> float:
    """The mean over some tasks of a seed."""
    return sum(seed[arm, task] for task in PARTS[part]) / len(PARTS[part])


def tables(found: list[Found]) -> str:
    """Accuracies, differences, what was left out."""
    lines = ["| arm | " + " | ".join(PARTS) + " | models |", "|---" * (len(PARTS) + 2) + "|"]
    for arm in ARMS:
        cells = " | ".join(shown([over(seed, arm, part) for seed in found]) for part in PARTS)
        models = sum(seed["models", arm] for seed in found) / len(found)
        lines.append(f"| {arm} | {cells} | {models:.1f} |")
    lines += ["", "| difference | " + " | ".join(PARTS) + " |", "|---" * (len(PARTS) + 1) + "|"]
    for one, other in COMPARED:
        cells = [
            shown([over(s, one, part) - over(s, other, part) for s in found], "+") for part in PARTS
        ]
        lines.append(f"| {one} - {other} | {' | '.join(cells)} |")
    cells = " | ".join(f"fit by {how} | left out" for how in FILTERS.values())
    lines += ["", f"| task | {cells} |", "|---" * (1 + 2 * len(FILTERS)) + "|"]
    for task in ROWS:
        parts = []
        for arm in FILTERS:
            times = sum(seed["left out " + arm, task] for seed in found)
            parts.append(shown([seed["fit " + arm, task] for seed in found], "+"))
            parts.append(f"{times:.0f} of {len(found)} seeds")
        lines.append(f"| {task} | {' | '.join(parts)} |")
    return "\n".join(lines) + "\n"


def judged(found: list[Found]) -> list[dict]:
    """Is one model as good, and do filter and stages help?"""
    results = []
    for one, other in COMPARED:
        for part in ("all", "low"):
            gain = over_seeds([over(s, one, part) - over(s, other, part) for s in found])
            end = gain.value if len(found) == 1 else gain.low  # of one seed there is no interval
            where = "all tasks" if part == "all" else "low-resource tasks"
            unit = f"accuracy on {where}, low end of the 95 % interval, {len(found)} seeds"
            results.append({"name": f"{one} - {other}, {part}", "value": round(end, 4),
                            "bound": "> 0", "holds": end > 0, "unit": unit})  # fmt: skip
    for arm in ("plain", "staged"):
        models = max(seed["models", arm] for seed in found)
        results.append({"name": f"models that serve {len(ROWS)} tasks, {arm}", "value": models,
                        "bound": None, "holds": True, "unit": "most of any seed"})  # fmt: skip
    return results


if __name__ == "__main__":
    main()
