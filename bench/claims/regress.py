"""Laws of mixture regression against one another: how well they rank runs they have not seen.

    python bench/claims/regress.py [--quick] [--seeds N] [--first SEED] [--work DIR]

On the lab's pool of twelve sources, LoRAs of the base are tuned for twenty steps on random
mixtures (`select regress`) and measured on 32 rows of each of the three targets. A power law in
effective data, the log-linear data mixing law and boosted trees are fitted to the first 16, 32
and 48 of these runs; how they rank the losses of 24 other runs is Spearman's correlation, the
mean over targets. The seed draws pool, mixtures, rows and orders; it is the random unit:
differences are taken within a seed, intervals are Student's t over seeds.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from _seeds import run_seeds
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

Found = dict[tuple[str, int], float]


def main() -> None:
    run_seeds("regress", str(__doc__), one_seed, tables, judged)


def one_seed(home: Path, seed: int, quick: bool) -> Found:
    """Rank correlation on held-out runs by (law, runs fitted)."""
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
    names = sorted({name for one in parts["fitted"] for name in one["weights"]})
    shares = {part: table(own, "weights", names) for part, own in parts.items()}
    losses = {part: table(own, "losses", [*tasks.TARGETS]) for part, own in parts.items()}
    found: Found = {}
    for law in LAWS:
        for count in (8,) if quick else COUNTS:
            ranks = []
            for t in range(len(tasks.TARGETS)):
                fitted = _laws.fit(law, shares["fitted"][:count], losses["fitted"][:count, t], seed)
                told = fitted.predict(shares["held"])
                ranks.append(float(spearmanr(told, losses["held"][:, t]).statistic))
            found[law, count] = sum(ranks) / len(ranks)
    return found


def read(path: Path) -> list[dict]:
    """One run a line."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def table(trials: list[dict], key: str, names: list[str]) -> np.ndarray:
    """Weights or losses as a matrix, runs by names."""
    return np.array([[one[key].get(name, 0.0) for name in names] for one in trials])


def over_seeds(values: list[float]) -> Estimate:
    """The mean of one value a seed."""
    return Estimate.from_items({f"seed {k}": v for k, v in enumerate(values)}, metric="mean")


def shown(values: list[float], sign: str = "") -> str:
    """Mean, and its interval where seeds differ."""
    one = over_seeds(values)
    if max(values) - min(values) < 1e-6:
        return f"{one.value:{sign}.3f}"
    return f"{one.value:{sign}.3f} [{one.low:{sign}.3f}, {one.high:{sign}.3f}]"


def tables(found: list[Found]) -> str:
    """Correlations, and the power law's lead."""
    counts = sorted({count for _, count in found[0]})
    heads = " | ".join(f"{count} runs" for count in counts)
    lines = [f"| law | {heads} |", "|---" * (1 + len(counts)) + "|"]
    for law in LAWS:
        cells = [shown([seed[law, count] for seed in found]) for count in counts]
        lines.append(f"| {law} | {' | '.join(cells)} |")
    for rival in LAWS[1:]:
        cells = [shown(lead(found, rival, count), "+") for count in counts]
        lines.append(f"| power - {rival} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def lead(found: list[Found], rival: str, count: int) -> list[float]:
    """Of the power law, one value a seed."""
    return [seed["power", count] - seed[rival, count] for seed in found]


def judged(found: list[Found]) -> list[dict]:
    """Does the power law rank better than its rivals, at equal runs?"""
    results = []
    for rival in LAWS[1:]:
        for count in sorted({count for _, count in found[0]}):
            one = over_seeds(lead(found, rival, count))
            end = one.value if len(found) == 1 else one.low  # of one seed there is no interval
            unit = f"Spearman, low end of the 95 % interval, {len(found)} seeds"
            results.append({"name": f"power - {rival}, {count} runs", "value": round(end, 4),
                            "bound": "> 0", "holds": end > 0, "unit": unit})  # fmt: skip
    return results


if __name__ == "__main__":
    main()
