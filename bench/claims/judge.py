"""A judge tuned on part of a set of judgements beside its base on the rest: who solved it rightly?

    DELTALOOM_ASSETS=DIR python bench/claims/judge.py [--quick] [--seeds N] [--first N] [--work DIR]

Questions of GSM8K's test with the solution that a person wrote and a wrong one by a language model
(6B or 175B parameters), as RewardBench makes its Math PRM pairs. Every seed draws the wrong
solution, the split (500 questions are learned from, 250 others asked about) and the tuning anew.
The judge is a story model of 487K parameters: all its weights are tuned on what `select judgements`
writes of single solutions, right or not, and `measure judge` has it rate the two solutions of a
pair by themselves, by likelihood. The base is the same model untouched, asked the same way. The
learning rate is the one that `claims/sparse.py` chose for a model of this family on other data.

**A judge may know a person's hand from a model's without knowing right from wrong.** So it is also
asked about pairs of which a model wrote both, one right and one wrong, to questions that it has not
seen. The shorter and the longer solution stand beside as judges without a model.

Intervals are Student's t over seeds, of differences within a seed; seeds share questions.
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from _seeds import over_seeds, run_seeds

import deltaloom

MODEL = "models/storyfam-L"
DATA = "data/gsm8k/example_model_solutions.jsonl"
SOLVERS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
LEARNED, ASKED = 500, 250
TUNING = {"lr": 3e-3, "epochs": 3, "batch_size": 16}

Row = dict[str, Any]


def main() -> None:
    """Parse, run what is missing, print."""
    if not os.environ.get("DELTALOOM_ASSETS"):
        print("DELTALOOM_ASSETS is not set: this bench needs a real model and data")
        print(
            json.dumps({"bench": "claims-judge", "results": [], "skipped": "no DELTALOOM_ASSETS"})
        )
        return
    run_seeds("judge", __doc__ or "", one_seed, tables, judged)


def one_seed(home: Path, seed: int, quick: bool) -> dict[str, float]:
    """Accuracy of every judge on one split."""
    assets = Path(os.environ["DELTALOOM_ASSETS"]).resolve()
    base = {"model": str(assets / MODEL), "device": "cpu"}
    learned, asked = (20, 20) if quick else (LEARNED, ASKED)
    rng = random.Random(f"judge {seed}")
    problems = [json.loads(line) for line in (assets / DATA).open(encoding="utf-8")]
    rng.shuffle(problems)
    hands = [one for row in problems if (one := by_hand(row, rng))]
    assert len(hands) >= learned + asked
    seen = {row["prompt"] for row in hands[:learned]}
    models = [
        one for row in problems if row["question"] not in seen and (one := by_models(row, rng))
    ]
    files = {
        "hand": write(home / "hand.jsonl", hands[learned : learned + asked]),
        "models": write(home / "models.jsonl", models[:asked]),
    }
    singles = write(home / "learned.jsonl", [one for row in hands[:learned] for one in apart(row)])
    deltaloom.select("judgements", base=base, pool=singles, out=home / "mixture", seed=seed)
    settings = {**TUNING, **({"epochs": 1} if quick else {})}
    deltaloom.tune(
        "full", base=base, data=home / "mixture", out=home / "judge", seed=seed, **settings
    )
    found: dict[str, float] = {}
    for name, file in files.items():
        for who, delta in (("base", "base"), ("tuned", str(home / "judge"))):
            (one,) = deltaloom.measure(
                "judge",
                base=base,
                deltas=[delta],
                tasks=[str(file)],
                shown="apart",
                labels=["0", "1"],
                out=home / f"{name}-{who}",
            ).values()
            found[f"{name}: {who}"] = one.value
        rows = [json.loads(line) for line in file.open(encoding="utf-8")]
        shorter = sum(map(prefers_shorter, rows)) / len(rows)
        found |= {f"{name}: shorter": shorter, f"{name}: longer": 1 - shorter}
    print(f"seed {seed}: {found}", flush=True)
    return found


def by_hand(row: Row, rng: random.Random) -> Row | None:
    """A person's solution and a wrong one, in either order; None where no model went wrong."""
    wrong = [row[name]["solution"] for name in SOLVERS if not row[name]["is_correct"]]
    return pair(row, row["ground_truth"], rng.choice(wrong), rng) if wrong else None


def by_models(row: Row, rng: random.Random) -> Row | None:
    """A right and a wrong solution that models wrote; None where all agree."""
    sides = [
        [row[name]["solution"] for name in SOLVERS if row[name]["is_correct"] is right]
        for right in (True, False)
    ]
    return pair(row, rng.choice(sides[0]), rng.choice(sides[1]), rng) if all(sides) else None


def pair(row: Row, right: str, wrong: str, rng: random.Random) -> Row:
    label = rng.choice((1, 2))
    both = (right, wrong) if label == 1 else (wrong, right)
    return {
        "prompt": row["question"],
        "output_1": both[0].strip(),
        "output_2": both[1].strip(),
        "label": label,
    }


def apart(row: Row) -> list[Row]:
    """Each solution as a judgement of its own: 1 for the right one, else 0."""
    return [
        {
            "prompt": row["prompt"],
            "response": row[f"output_{k}"],
            "score": int(row["label"] == k),
            "source": "maths",
        }
        for k in (1, 2)
    ]


def prefers_shorter(row: Row) -> float:
    """1 where the shorter solution is the right one, one half where they are as long."""
    gap = len(row["output_1"]) - len(row["output_2"])
    return 0.5 if gap == 0 else float((gap < 0) == (row["label"] == 1))


def write(path: Path, rows: list[Row]) -> Path:
    """One JSON object a line, with ids."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"id": f"{path.stem}-{k}", **row}) + "\n" for k, row in enumerate(rows)]
    path.write_text("".join(lines), encoding="utf-8")
    return path


COMPARED = (
    ("hand: tuned", "hand: base", "> 0"),
    ("hand: tuned", "hand: shorter", None),
    ("hand: tuned", "hand: longer", None),
    ("models: tuned", "models: base", None),
)


def tables(found: list[dict[str, float]]) -> str:
    """Accuracies and differences."""
    lines = ["| judge | accuracy | by seed |", "|---|---|---|"]
    for name in found[0]:
        values = [one[name] for one in found]
        mean = over_seeds(values)
        by_seed = " ".join(f"{value:.3f}" for value in values)
        lines.append(f"| {name} | {mean.value:.3f} [{mean.low:.3f}, {mean.high:.3f}] | {by_seed} |")
    lines += ["", "| difference | mean |", "|---|---|"]
    for first, second, _ in COMPARED:
        gap = over_seeds([one[first] - one[second] for one in found])
        lines.append(f"| {first} - {second} | {gap.value:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}] |")
    return "\n".join(lines)


def judged(found: list[dict[str, float]]) -> list[dict[str, Any]]:
    """The claim, and what to hold against it."""
    results = []
    for name in found[0]:
        mean = over_seeds([one[name] for one in found])
        unit = f"accuracy, [{mean.low:.3f}, {mean.high:.3f}], {len(found)} seeds"
        results.append(row(name, mean.value, None, True, unit))
    for first, second, bound in COMPARED:
        gap = over_seeds([one[first] - one[second] for one in found])
        unit = f"difference in accuracy, {len(found)} seeds"
        title = f"{first} - {second}, low end of the 95 % interval"
        results.append(row(title, gap.low, bound, bound is None or gap.low > 0, unit))
    return results


def row(name: str, value: float, bound: str | None, holds: bool, unit: str) -> dict[str, Any]:
    """One result."""
    value = float(f"{value:.4g}")
    return {"name": name, "value": value, "bound": bound, "holds": holds, "unit": unit}


if __name__ == "__main__":
    main()
