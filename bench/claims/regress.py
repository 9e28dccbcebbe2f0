"""Laws of mixture regression against one another, and their mixtures against proportional mixing.

    python bench/claims/regress.py [--quick] [--seeds N] [--first SEED] [--work DIR]

On the lab's pool of twelve sources, LoRAs of the base are tuned for twenty steps on random
mixtures (`select regress`) and measured on 32 rows of each of the three targets. A power law in
effective data, the log-linear data mixing law and boosted trees are fitted to the first 16, 32
and 48 of these runs; how they rank the losses of 24 other runs is Spearman's correlation, the
mean over targets. Each law then weighs the sources from all 48 runs for an epoch of a quarter of
the pool, none of whose rows is repeated in it, and a LoRA is tuned on `EPOCHS` such epochs; the
rival is as many rows of the pool as it is, each seen once. All are asked about people who are in
no other file. The seed draws pool, mixtures, rows and orders; it is the random unit: differences
are taken within a seed, intervals are Student's t over seeds.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from _seeds import over_seeds, run_seeds, shown
from scipy.stats import spearmanr

import deltaloom
from deltaloom.core.estimate import Estimate
from deltaloom.lab import tasks
from deltaloom.lab.files import write_lab
from deltaloom.select import _laws

RUNS, HELD = 48, 24
COUNTS = (16, 32, 48)
LAWS = ("power", "loglinear", "trees")
TUNING = {"lr": 3e-3}
"""The quickstart's."""
EPOCHS = 4
"""Of the quarter of the pool that a law weighs, so that all arms see as many rows as it has."""
ARMS = ("proportional", *LAWS)

Found = dict[tuple[str, str | int], float]


def main() -> None:
    run_seeds("regress", str(__doc__), one_seed, tables, judged)


def one_seed(home: Path, seed: int, quick: bool) -> Found:
    """Rank correlation on held-out runs by (law, runs fitted); accuracy by (arm, target)."""
    lab = write_lab(home / "lab", seed, "small" if quick else "full")
    target = [lab[f"target-{name}"] for name in tasks.TARGETS]
    given = {"base": lab["base"], "pool": lab["pool"], "target": target, "tuning": TUNING}
    given["steps"] = 4 if quick else 20
    parts = {}
    for part, runs in {"fitted": 8 if quick else RUNS, "held": 8 if quick else HELD}.items():
        # Another seed draws other mixtures and rows.
        own = {"runs": runs, "seed": seed + 1000 * (part == "held"), "out": home / part}
        deltaloom.select("regress", **given, **own)
        parts[part] = read(home / part / "trials.jsonl")
    found = ranks(parts, (8,) if quick else COUNTS, seed)
    return {**found, **tuned(home, lab, given, seed)}


def ranks(parts: dict[str, list[dict]], counts: tuple[int, ...], seed: int) -> Found:
    """How laws fitted on the first so many runs rank the held-out ones."""
    names = sorted({name for one in parts["fitted"] for name in one["weights"]})
    shares = {part: table(own, "weights", names) for part, own in parts.items()}
    losses = {part: table(own, "losses", [*tasks.TARGETS]) for part, own in parts.items()}
    found: Found = {}
    for law in LAWS:
        for count in counts:
            own = []
            for t in range(len(tasks.TARGETS)):
                fitted = _laws.fit(law, shares["fitted"][:count], losses["fitted"][:count, t], seed)
                told = fitted.predict(shares["held"])
                own.append(float(spearmanr(told, losses["held"][:, t]).statistic))
            found[law, count] = sum(own) / len(own)
    return found


def tuned(home: Path, lab: dict[str, Path], given: dict[str, Any], seed: int) -> Found:
    """Accuracy of a LoRA tuned on each law's mixture and on the pool as it is, at equal rows."""
    shared = {"base": lab["base"], "seed": seed}
    outs = {arm: home / f"tuned-{arm}" for arm in ARMS}
    for arm, out in outs.items():
        data: dict[str, Any] = {"data": lab["pool"], "epochs": 1}
        if arm in LAWS:
            mixture = home / f"mixture-{arm}"
            own = {"law": arm, "trials": home / "fitted", "seed": seed, "out": mixture}
            deltaloom.select("regress", **given, **own)
            data = {"data": mixture, "epochs": EPOCHS}
        deltaloom.tune("lora", **shared, **data, **TUNING, batch_size=16, save_steps=2000, out=out)
    asked = [lab[f"test-{name}"] for name in tasks.TARGETS]
    folder = home / "asked"
    deltaloom.measure("choice", **shared, deltas=[*outs.values()], tasks=asked, out=folder)
    found: Found = {}
    for arm, out in outs.items():
        for name, test in zip(tasks.TARGETS, asked, strict=True):
            text = (folder / f"{out.name}--{test.stem}" / "estimate.json").read_text()
            found[arm, name] = Estimate.from_json(text).value
    return found


def over_targets(seed: Found, arm: str) -> float:
    """The mean of a seed's targets."""
    return sum(seed[arm, name] for name in tasks.TARGETS) / len(tasks.TARGETS)


def read(path: Path) -> list[dict]:
    """One run a line."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def table(trials: list[dict], key: str, names: list[str]) -> np.ndarray:
    """Weights or losses as a matrix, runs by names."""
    return np.array([[one[key].get(name, 0.0) for name in names] for one in trials])


def tables(found: list[Found]) -> str:
    """Correlations, the power law's lead, and what the mixtures are worth."""
    counts = counts_of(found)
    heads = " | ".join(f"{count} runs" for count in counts)
    lines = [f"| law | {heads} |", "|---" * (1 + len(counts)) + "|"]
    for law in LAWS:
        cells = [shown([seed[law, count] for seed in found]) for count in counts]
        lines.append(f"| {law} | {' | '.join(cells)} |")
    for rival in LAWS[1:]:
        cells = [shown(lead(found, rival, count), "+") for count in counts]
        lines.append(f"| power - {rival} | {' | '.join(cells)} |")
    lines += ["", f"| mixture | all targets | {' | '.join(tasks.TARGETS)} |", "|---" * 5 + "|"]
    for arm in ARMS:
        parts = [[seed[arm, name] for seed in found] for name in tasks.TARGETS]
        cells = " | ".join(f"{sum(part) / len(part):.3f}" for part in parts)
        lines.append(f"| {arm} | {shown([over_targets(s, arm) for s in found])} | {cells} |")
    for one, other in compared():
        lines.append(f"| {one} - {other} | {shown(gain(found, one, other), '+')} | | | |")
    return "\n".join(lines) + "\n"


def lead(found: list[Found], rival: str, count: int) -> list[float]:
    """Of the power law, one value a seed."""
    return [seed["power", count] - seed[rival, count] for seed in found]


def counts_of(found: list[Found]) -> list[int]:
    """Numbers of runs that laws were fitted on."""
    return sorted({count for _, count in found[0] if isinstance(count, int)})


def compared() -> list[tuple[str, str]]:
    """Pairs of mixtures: each law's against the pool as it is, the power law's against rivals."""
    return [*((law, "proportional") for law in LAWS), *(("power", law) for law in LAWS[1:])]


def gain(found: list[Found], one: str, other: str) -> list[float]:
    """Of accuracy, one value a seed."""
    return [over_targets(seed, one) - over_targets(seed, other) for seed in found]


def judged(found: list[Found]) -> list[dict]:
    """Does the power law rank better at equal runs, and do mixtures found beat the pool's own?"""
    results = []

    def add(name: str, values: list[float], what: str) -> None:
        one = over_seeds(values)
        end = one.value if len(found) == 1 else one.low  # of one seed there is no interval
        unit = f"{what}, low end of the 95 % interval, {len(found)} seeds"
        results.append({"name": name, "value": round(end, 4), "bound": "> 0", "holds": end > 0,
                        "unit": unit})  # fmt: skip

    for rival in LAWS[1:]:
        for count in counts_of(found):
            add(f"power - {rival}, {count} runs", lead(found, rival, count), "Spearman")
    for one, other in compared():
        add(f"mixture of {one} - {other}", gain(found, one, other), "accuracy")
    return results


if __name__ == "__main__":
    main()
