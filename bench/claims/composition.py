"""Does training on texts of two and three skills teach to combine four and five, and other skills?

    python bench/claims/composition.py [--quick] [--seeds N] [--first SEED] [--work DIR]

The paper: Zhao et al. 2024, "Can Models Learn Skill Composition from Examples?" (arXiv 2409.19808).
In the lab's world are twenty skills with an exact check; five, one of each category, are held out.
Each seed pretrains a base on texts of no skill or one (of all twenty), composes a pool, lets
`select skillrich` keep the full marks of the fifteen training skills, tunes all weights, and lets
`measure skillmix` ask combinations of one to five training skills, of one to three held-out ones,
and of both kinds mixed. Arms: the base; k = 1, on as many tokens as the others; k = 2 and 3; both
again with one row in two from the pretraining mix, which has held-out skills alone (replay). The
seed draws weights, pool, order and questions; it is the random unit: differences are taken within
a seed, and intervals are Student's t over seeds.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from _seeds import over_seeds, run_seeds

import deltaloom
from deltaloom.lab import skills as world
from deltaloom.lab.skill_files import write_skill_lab

ROWS, POOL, ASKED = 3000, 24_000, 200
"""Rows of k = 2 and 3 to tune on, rows in the pool, combinations of every kind asked."""
TUNE = {"lr": 1e-3, "epochs": 3, "save_steps": 100_000}
"""All else is the method's default."""
ARMS = ("base", "k=1", "k=2,3", "k=1 + replay", "k=2,3 + replay")
KINDS = (
    *(f"k={k}" for k in range(1, 6)),
    *(f"held-out k={k}" for k in range(1, 4)),
    *(f"mixed k={k}" for k in (2, 3)),
)
PAIRS = (
    ("k=2,3", "base"),
    ("k=2,3", "k=1"),
    ("k=2,3 + replay", "base"),
    ("k=2,3 + replay", "k=1 + replay"),
)
CLAIMED = ("k=4", "k=5", "held-out k=2", "held-out k=3", "mixed k=2", "mixed k=3")
Found = dict[tuple[str, str], float]


def main() -> None:
    run_seeds("composition", str(__doc__), one_seed, tables, judged)


def one_seed(home: Path, seed: int, quick: bool) -> Found:
    """Full marks by (arm, kind), and composition efficiency by (arm, "efficiency k=...")."""
    share = 12 if quick else 1
    lab = write_skill_lab(home / "lab", seed, rows=POOL // share, texts=28_000 // share)
    files = {name: str(lab[name]) for name in ("skills", "topics", "wording")}
    held_out = [f"[{name}]" for name in world.HELD_OUT]
    outs = trained(home, lab, files, held_out, seed, ROWS // share)
    asked = {
        **files,
        "base": str(lab["base"]),
        "deltas": ["base", *map(str, outs.values())],
        "combinations": ASKED // share,
        "temperature": 0.0,  # the likeliest text, so that only the seed is random
        "max_new_tokens": 64,
        "seed": seed,
    }
    trained_on = deltaloom.measure("skillmix", out=home / "trained", without=held_out, **asked)
    others = deltaloom.measure(
        "skillmix", out=home / "held-out", only=held_out, **{**asked, "k": [1, 2, 3]}
    )
    rows = write(home / "mixed.jsonl", mixed_rows(seed, ASKED // share))
    both = deltaloom.measure("skillmix", out=home / "mixed", tasks=str(rows), **asked)
    found: Found = {}
    labels = {"base": "base", **{arm: out.name for arm, out in outs.items()}}
    for arm, label in labels.items():
        for k in range(1, 6):
            found[arm, f"k={k}"] = trained_on[f"{label}--skillmix.k{k}"].value
        for k in range(1, 4):
            found[arm, f"held-out k={k}"] = others[f"{label}--skillmix.k{k}"].value
        for k in (2, 3):
            found[arm, f"mixed k={k}"] = both[f"{label}--mixed.k{k}"].value
        document = json.loads((home / "trained" / f"{label}--skillmix/skillmix.json").read_text())
        for k in range(2, 6):
            one = document["efficiency"][str(k)]
            found[arm, f"efficiency k={k}"] = one["value"] if one else 0.0
    return found


def trained(
    home: Path, lab: dict[str, Path], files: dict, held_out: list[str], seed: int, rows: int
) -> dict[str, Path]:
    """A tuned folder for each arm."""
    chosen = {}
    for name, ks, count in (("few", [1], 10 * rows), ("many", [2, 3], rows)):
        kept = deltaloom.select(
            "skillrich", pool=str(lab["pool"]), out=home / name, seed=seed, k=ks, count=count,
            without=held_out, **files,
        )  # fmt: skip
        chosen[name] = [dict(row.to_row()) for row in kept]
    # As many tokens of single skills as of combined ones: more rows.
    budget = sum(length(row) for row in chosen["many"])
    few, spent = [], 0
    for number in range(10 * rows):
        row = chosen["few"][number % len(chosen["few"])]
        if spent + length(row) > budget:
            break
        few.append({**row, "id": f"few-{number}"})
        spent += length(row)
    data = {"k=1": few, "k=2,3": chosen["many"]}
    outs = {}
    for number, arm in enumerate(ARMS[1:]):
        own = data[arm.removesuffix(" + replay")]
        if arm.endswith("replay"):
            own = [*own, *world.compose([0, 1, 1, 1, 1], len(own), seed + 2)]
        file = write(home / f"arm{number}.jsonl", own)
        outs[arm] = home / f"tuned{number}"
        deltaloom.tune("full", base=str(lab["base"]), data=str(file), out=outs[arm], seed=seed,
                       **TUNE)  # fmt: skip
    return outs


def length(row: dict) -> int:
    """Words of a row: one token each."""
    return len(f"{row['prompt']}{row['completion']}".split())


def mixed_rows(seed: int, count: int) -> list[dict]:
    """Combinations of two and three skills, one of them held out."""
    rng = random.Random(f"mixed {seed}")
    plain = [name for name in world.NAMES if name not in world.HELD_OUT]
    rows = []
    for k in (2, 3):
        for number in range(count):
            names = [rng.choice(world.HELD_OUT), *rng.sample(plain, k - 1)]
            rng.shuffle(names)
            row = world.record(rng.choice(list(world.TOPICS)), names, "")
            rows.append({"id": f"mixed-{k}-{number}", "prompt": row["prompt"],
                         "skills": row["skills"], "topic": row["topic"]})  # fmt: skip
    return rows


def write(path: Path, rows: list[dict]) -> Path:
    """One JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def shown(values: list[float], sign: str = "") -> str:
    """Mean, and its interval where seeds differ."""
    one = over_seeds(values)
    if max(values) - min(values) < 1e-6:
        return f"{one.value:{sign}.2f}"
    return f"{one.value:{sign}.2f} [{one.low:{sign}.2f}, {one.high:{sign}.2f}]"


def tables(found: list[Found]) -> str:
    """Full marks, efficiencies and differences."""
    lines = ["| full marks | " + " | ".join(ARMS) + " |", "|---" * (len(ARMS) + 1) + "|"]
    efficiencies = [f"efficiency k={k}" for k in range(2, 6)]
    for kind in (*KINDS, *efficiencies):
        cells = " | ".join(shown([seed[arm, kind] for seed in found]) for arm in ARMS)
        lines.append(f"| {kind} | {cells} |")
    heads = " | ".join(f"{one} - {other}" for one, other in PAIRS)
    lines += ["", f"| difference | {heads} |", "|---" * (len(PAIRS) + 1) + "|"]
    for kind in KINDS:
        cells = " | ".join(shown(difference(found, kind, *pair), "+") for pair in PAIRS)
        lines.append(f"| {kind} | {cells} |")
    return "\n".join(lines) + "\n"


def difference(found: list[Found], kind: str, one: str, other: str) -> list[float]:
    """Of two arms, one value a seed."""
    return [seed[one, kind] - seed[other, kind] for seed in found]


def judged(found: list[Found]) -> list[dict]:
    """Is the arm of k = 2 and 3 better than before, and than the arm of k = 1?"""
    results = []
    unit = f"full marks, low end of the 95 % interval, {len(found)} seeds"
    for one, other in PAIRS:
        for kind in CLAIMED:
            gain = over_seeds(difference(found, kind, one, other))
            end = gain.value if len(found) == 1 else gain.low  # of one seed there is no interval
            results.append({"name": f"{kind}: {one} - {other}", "value": round(end, 4),
                            "bound": "> 0", "holds": end > 0, "unit": unit})  # fmt: skip
    return results


if __name__ == "__main__":
    main()
