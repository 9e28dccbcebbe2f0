"""SPoT's retrieved prompt against a random beginning, at equal steps, on the lab.

    python bench/claims/spot.py [--quick] [--seeds N] [--first SEED] [--work DIR]

A soft prompt is tuned for each of the lab's nine attributes, asked in one wording, on people of the
pool. Each of the three targets is asked in another wording and has 32 rows. Its prompt begins from
random tokens, from what SPoT retrieves among the nine (the nearest, or the mean of the three
nearest), from one of the nine drawn by lot, which tells retrieval from beginning with any tuned
prompt, or from that of its own attribute, which is what retrieval should find. It is tuned for few
and for many steps. SPoT spends steps on the embedding, so `random, longer` is tuned for those more.
All are asked about people who are in no training row. The seed draws people, beginnings and order;
it is the random unit: differences are taken within a seed, over the mean of its targets; intervals
are Student's t over seeds.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from _seeds import over_seeds, run_seeds, shown

import deltaloom
from deltaloom.core.estimate import Estimate
from deltaloom.core.run import Run
from deltaloom.lab import tasks
from deltaloom.lab.files import write_lab
from deltaloom.lab.world import ATTRIBUTES, World, build_world

TUNE = {"virtual_tokens": 8, "batch_size": 16, "save_steps": 1000}
"""All else is the method's default; no checkpoints are needed."""
SOURCE_STEPS = 65
"""Five epochs of 208 rows."""
STEPS = {"few": 10, "many": 40}
EMBEDDING_STEPS = 20
"""Steps of the target, two an epoch."""
ARMS = ("random", "random, longer", "drawn source", "own source", "retrieved", "mean of 3")
COMPARED = (
    ("retrieved", "random"),
    ("retrieved", "random, longer"),
    ("retrieved", "drawn source"),
    ("mean of 3", "random"),
    ("own source", "random"),
    ("own source", "retrieved"),
)


def main() -> None:
    run_seeds("spot", str(__doc__), one_seed, tables, judged)


def one_seed(home: Path, seed: int, quick: bool) -> dict[tuple[str, ...], float]:
    """Accuracy by (length, arm, target), and by (length, "found", target) if SPoT found its own."""
    base = write_lab(home / "lab", seed, "small")["base"]
    world = build_world()
    split = tasks.split_people(world, seed)

    def tune(name: str, data: Path, steps: float, **settings: object) -> Path:
        rows = sum(1 for _ in data.open())
        epochs = (2 if quick else steps) * TUNE["batch_size"] / rows
        given = {"base": base, "data": data, "out": home / name, "seed": seed, "epochs": epochs}
        deltaloom.tune("prompt", **given, **TUNE, **settings)
        return home / name

    prompts = {}
    for attribute in ATTRIBUTES:
        data = write(home / f"{attribute}.jsonl", source_rows(world, split.pool, attribute, seed))
        prompts[attribute] = str(tune(f"source-{attribute}", data, SOURCE_STEPS))
    found: dict[tuple[str, ...], float] = {}
    spot = {"library": [*prompts.values()], "embedding_steps": 2 if quick else EMBEDDING_STEPS}
    for target in tasks.TARGETS[: 1 if quick else None]:
        few = tasks.target_records(world, split.target, target, seed)
        asked = tasks.test_records(world, split.test, target, 2, seed)
        data = write(home / f"few-{target}.jsonl", few)
        test = write(home / f"test-{target}.jsonl", asked)
        drawn = random.Random(f"source {target} {seed}").choice([*prompts.values()])
        starts = {
            "random": {},
            "random, longer": {},
            "drawn source": {"start": drawn},
            "own source": {"start": prompts[target]},
            "retrieved": spot,
            "mean of 3": {**spot, "retrieve": "mean", "top": 3},
        }
        outs: dict[tuple[str, str], Path] = {}
        for length, steps in STEPS.items():
            for number, (arm, own) in enumerate(starts.items()):
                extra = EMBEDDING_STEPS if arm == "random, longer" else 0
                outs[length, arm] = tune(f"{target}-{length}-{number}", data, steps + extra, **own)
        deltas, folder = [str(out) for out in outs.values()], home / f"asked-{target}"
        deltaloom.measure("choice", base=base, deltas=deltas, tasks=test, out=folder, seed=seed)
        for (length, arm), out in outs.items():
            file = folder / f"{out.name}--{test.stem}" / "estimate.json"
            found[length, arm, target] = Estimate.from_json(file.read_text()).value
        for length in STEPS:
            taken = Run.read(outs[length, "retrieved"])["notes"]["retrieved"]["weights"]
            found[length, "found", target] = float(prompts[target] in taken)
    return found


def source_rows(world: World, people: tuple[str, ...], attribute: str, seed: int) -> list[dict]:
    """Two questions about each person, in the wording that no target has."""
    rng = random.Random(f"source {attribute} {seed}")
    forms = [(opener, verb) for opener in tasks.OPENERS for verb in tasks.VERBS[attribute]]
    kind = ATTRIBUTES[attribute].kind
    return [
        {
            "prompt": tasks.FORM.format(opener=opener, verb=verb, kind=kind, name=name),
            "completion": f" {world.facts[name][attribute]}",
        }
        for name in people
        for opener, verb in rng.sample(forms, 2)
    ]


def write(path: Path, rows: list[dict]) -> Path:
    """One JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def over_targets(seed: dict[tuple[str, ...], float], length: str, arm: str) -> float:
    """The mean of a seed's targets."""
    own = [seed[length, arm, t] for t in tasks.TARGETS if (length, arm, t) in seed]
    return sum(own) / len(own)


def tables(found: list[dict[tuple[str, ...], float]]) -> str:
    """Accuracies and differences."""
    lines = ["| steps | beginning | all | " + " | ".join(tasks.TARGETS) + " |", "|---" * 6 + "|"]
    targets = [target for target in tasks.TARGETS if ("few", "random", target) in found[0]]
    for length, steps in STEPS.items():
        for arm in ARMS:
            parts = [sum(s[length, arm, t] for s in found) / len(found) for t in targets]
            cells = " | ".join(f"{part:.3f}" for part in parts)
            union = shown([over_targets(s, length, arm) for s in found])
            lines.append(f"| {steps} | {arm} | {union} | {cells} |")
    hits = [over_targets(seed, length, "found") for length in STEPS for seed in found]
    lines += ["", f"Retrieved was the target's own: {sum(hits) / len(hits):.0%} (by lot: 11 %)."]
    lines += ["", "| difference | few | many |", "|---|---|---|"]
    for one, other in COMPARED:
        cells = " | ".join(shown(difference(found, length, one, other), "+") for length in STEPS)
        lines.append(f"| {one} - {other} | {cells} |")
    return "\n".join(lines) + "\n"


def difference(
    found: list[dict[tuple[str, ...], float]], length: str, one: str, other: str
) -> list[float]:
    """Of two arms, one value a seed."""
    return [over_targets(s, length, one) - over_targets(s, length, other) for s in found]


def judged(found: list[dict[tuple[str, ...], float]]) -> list[dict]:
    """Is what SPoT retrieves a better beginning?"""
    results = []
    unit = f"accuracy, low end of the 95 % interval, {len(found)} seeds"
    for length in STEPS:
        for one, other in COMPARED[:4]:
            gain = over_seeds(difference(found, length, one, other))
            end = gain.value if len(found) == 1 else gain.low  # of one seed there is no interval
            results.append({"name": f"{length}: {one} - {other}", "value": round(end, 4),
                            "bound": "> 0", "holds": end > 0, "unit": unit})  # fmt: skip
    return results


if __name__ == "__main__":
    main()
