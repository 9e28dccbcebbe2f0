"""Post-training of a small model, each stage against the one before, on the lab.

    python bench/claims/posttraining.py [--quick] [--seeds N] [--first SEED] [--work DIR]

The stages of `recipes/small_model_posttraining.yaml` with its settings: a mixture is found
(`select tailpatch`), all weights are tuned on it, then on preferences (KTO), then the weights of
the last two are averaged. Preferences are questions about people of the pool whose right and wrong
answers a program knows. Beside the stages: DPO in KTO's place and its average; plain tuning on the
right answers of the same questions for as many passes, at the same rate (`answers`), which is what
preferences must beat; and, in the mixture's place, as many rows of the pool as it is (`as it is`).
All are asked about people who are in no other file. The seed draws pool, people, rows and orders;
it is the random unit: differences are taken within a seed, intervals are Student's t over seeds.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from _seeds import over_seeds, run_seeds

import deltaloom
from deltaloom.core.estimate import Estimate
from deltaloom.lab import tasks
from deltaloom.lab.files import write_lab

MIX = {"passes": 5, "steps": 8, "tuning": {"lr": 3e-3}}
INSTRUCT = {"lr": 1e-3, "epochs": 4, "save_steps": 2000}
PREFER = {"tuned": "full", "lr": 1e-4, "epochs": 3, "save_steps": 2000}
SCALE = 0.5
"""The recipe's, all of them, but for the checkpoints: one is enough."""
ARMS = {
    "base": "untuned",
    "plain": "tuned on the pool as it is",
    "instructed": "tuned on the mixture found",
    "answers": "then on the questions' right answers",
    "kto": "instead on preferences, KTO",
    "kto-fused": "averaged with the stage before",
    "dpo": "instead on preferences, DPO",
    "dpo-fused": "averaged with the stage before",
}
COMPARED = (
    ("instructed", "base"),
    ("instructed", "plain"),
    ("kto", "instructed"),
    ("dpo", "instructed"),
    ("kto", "answers"),
    ("dpo", "answers"),
    ("kto", "dpo"),
    ("kto-fused", "kto"),
    ("dpo-fused", "dpo"),
)

Found = dict[tuple[str, str], float]


def main() -> None:
    run_seeds("posttraining", str(__doc__), one_seed, tables, judged)


def one_seed(home: Path, seed: int, quick: bool) -> Found:
    """Accuracy by (arm, target)."""
    lab = write_lab(home / "lab", seed, "small" if quick else "full")
    shared = {"base": lab["base"], "seed": seed}
    outs = {arm: home / arm for arm in ARMS if arm != "base"}
    instruct(home / "mixture", lab, shared, outs, quick)
    stage = {"base": outs["instructed"], "seed": seed}
    how = {**PREFER, "epochs": 1} if quick else PREFER
    for loss in ("kto", "dpo"):
        given = {**stage, **how, "data": lab["questions"], "loss": loss}
        deltaloom.tune("prefer", **given, out=outs[loss])
        given = {**stage, "deltas": [outs[loss]], "scale": SCALE}
        deltaloom.merge("task_arithmetic", **given, out=outs[f"{loss}-fused"])
    given = {key: value for key, value in how.items() if key != "tuned"}
    rows = answered(lab["questions"], home / "answers.jsonl")
    deltaloom.tune("full", **stage, **given, data=rows, out=outs["answers"])
    found = asked(home / "asked-base", lab, shared, {"base": "base", "plain": outs["plain"]})
    rest = {"instructed": "base", **{arm: outs[arm] for arm in list(ARMS)[3:]}}
    return {**found, **asked(home / "asked-instructed", lab, stage, rest)}


def instruct(
    mixture: Path, lab: dict[str, Path], shared: dict[str, Any], outs: dict[str, Path], quick: bool
) -> None:
    """Tune on the mixture that tail-patch finds and, at equal rows, on the pool as it is."""
    target = [lab[f"target-{name}"] for name in tasks.TARGETS]
    how = {**MIX, "cost": 10} if quick else MIX  # the small pool is not worth its targets
    deltaloom.select("tailpatch", **shared, **how, pool=lab["pool"], target=target, out=mixture)
    epochs = 1 if quick else INSTRUCT["epochs"]
    mixed = {**INSTRUCT, "data": mixture, "epochs": epochs}
    deltaloom.tune("full", **shared, **mixed, out=outs["instructed"])
    rows = len(deltaloom.Examples.read(mixture)) / len(deltaloom.Examples.read(lab["pool"]))
    plain = {**INSTRUCT, "data": lab["pool"], "epochs": epochs * rows}
    deltaloom.tune("full", **shared, **plain, out=outs["plain"])


def answered(questions: Path, path: Path) -> Path:
    """The questions with their right answers, as rows to learn."""
    rows = [json.loads(line) for line in questions.read_text().splitlines()]
    kept = [
        {"id": r["id"], "prompt": r["prompt"], "completion": r["choices"][r["answer"]]}
        for r in rows
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in kept))
    return path


def asked(folder: Path, lab: dict[str, Path], given: dict[str, Any], arms: dict[str, Any]) -> Found:
    """Accuracy by (arm, target) of deltas of one base."""
    tests = [lab[f"test-{name}"] for name in tasks.TARGETS]
    names = [str(one) for one in arms.values()]
    deltaloom.measure("choice", **given, deltas=names, tasks=tests, out=folder)
    found: Found = {}
    for arm, name in arms.items():
        for target, test in zip(tasks.TARGETS, tests, strict=True):
            text = (folder / f"{Path(name).name}--{test.stem}" / "estimate.json").read_text()
            found[arm, target] = Estimate.from_json(text).value
    return found


def over_targets(seed: Found, arm: str) -> float:
    """The mean of a seed's targets."""
    return sum(seed[arm, name] for name in tasks.TARGETS) / len(tasks.TARGETS)


def gain(found: list[Found], one: str, other: str) -> Estimate:
    """The mean difference over seeds."""
    return over_seeds([over_targets(seed, one) - over_targets(seed, other) for seed in found])


def shown(one: Estimate, sign: str = "") -> str:
    """Mean, and its interval where there is one."""
    if not one.low < one.high < float("inf"):
        return f"{one.value:{sign}.3f}"
    return f"{one.value:{sign}.3f} [{one.low:{sign}.3f}, {one.high:{sign}.3f}]"


def tables(found: list[Found]) -> str:
    """Accuracies, and each stage against the one before."""
    heads = " | ".join(tasks.TARGETS)
    lines = [f"| stage | what | all targets | {heads} |", "|---" * 6 + "|"]
    for arm, what in ARMS.items():
        parts = [sum(seed[arm, name] for seed in found) / len(found) for name in tasks.TARGETS]
        whole = shown(over_seeds([over_targets(seed, arm) for seed in found]))
        cells = " | ".join(f"{part:.3f}" for part in parts)
        lines.append(f"| {arm} | {what} | {whole} | {cells} |")
    lines += ["", "| difference | accuracy |", "|---|---|"]
    lines += [f"| {a} - {b} | {shown(gain(found, a, b), '+')} |" for a, b in COMPARED]
    return "\n".join(lines) + "\n"


def judged(found: list[Found]) -> list[dict]:
    """Is each stage better than the one before, and than its plain rival?"""
    results = []
    for one, other in COMPARED:
        own = gain(found, one, other)
        end = own.value if len(found) == 1 else own.low  # of one seed there is no interval
        unit = f"accuracy, low end of the 95 % interval, {len(found)} seeds"
        results.append({"name": f"{one} - {other}", "value": round(end, 4), "bound": "> 0",
                        "holds": end > 0, "unit": unit})  # fmt: skip
    return results


if __name__ == "__main__":
    main()
