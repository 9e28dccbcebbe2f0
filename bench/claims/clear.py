"""CleaR under label noise, beside plain LoRA, full tuning, dropping, cleanlab and the clean rows.

    DELTALOOM_ASSETS=DIR python bench/claims/clear.py [--quick] [--data SET ...] [--noise NAME ...]
        [--seeds N] [--workers N] [--device cuda|cpu] [--work DIR] [--done]

Sets: *lab*, the lab's pretrained model (0.9M parameters), which learns to name the town where a
person was born, ten classes, from 288 questions about people it knows from pretraining, and is
asked about others; *trec*, MiniLM (22.7M parameters) with a head of six classes on 1,600 questions
of TREC, and its 500 test questions; *hausa* and *yoruba*, MiniLM on 2,045 and 1,340 headlines of
news. In the first two, labels are replaced: *symmetric* noise of a share puts a class drawn from
all in its place (now and then the right one again), *asymmetric* noise the class before it, as the
authors' code does both; every seed draws rows, noise and tuning anew. The headlines have the labels
that keyword rules gave them, a half and a third of them wrong by the labels that people gave the
same headlines; there seeds differ in tuning alone.

Arms: LoRA, full tuning, CleaR (`tune clear`), dropping (`rule=drop`: the same judgements, rows
below one half left out of the loss), cleanlab (`find_label_issues` as it comes, on probabilities
from LoRA on the other half; LoRA on the rest), and LoRA on the rows whose labels are right (the
oracle). All have the same epochs and batches. The learning rates are those with which plain LoRA
and full tuning were best without noise: in the lab on another seed, for MiniLM the mean accuracy
over two other seeds on rows of TREC kept for that. CleaR's other settings are its defaults.

Intervals are Student's t over seeds, of differences within a seed. *Memorised* is the share of
wrong labels that the tuned model gives back; *AUC* is the chance that a wrong label has a lower
probability than a right one. `--done` tells what a folder holds and runs nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import tempfile
import warnings
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
from _clear_arms import ARMS, RATES, Setting, rate
from _clear_data import FOUND, NOISES, SETS, noises
from _units import Units

from deltaloom.core.estimate import Estimate

FIRST = 40
"""First seed (the lab's settings were tried on 100)."""
SWEEP_SEEDS = (100, 101)

Found = dict[tuple[str, str], dict[str, list[dict[str, float]]]]
"""(Set, noise) -> arm -> one result a seed."""


def unit(home: Path, device: str, quick: bool, name: str) -> dict[str, Any]:
    """Make one unit: a rate tried, or an arm's result."""
    warnings.filterwarnings("ignore")
    units = Units(home / "units", {})
    what, *words = name.split("; ")
    if what == "rate":
        arm, lr, seed = words
        return rate(home / "runs", arm, float(lr), int(seed), device)
    data, noise, arm, seed = what, *words
    rates = {} if data == "lab" or quick else {one: chosen(units, one) for one in RATES}
    place = home / "runs" / name.replace("; ", "-").replace(" ", "-").replace("%", "percent")
    return Setting(place, data, noise, int(seed), device, quick, rates).reached(arm)


def chosen(units: Units, arm: str) -> float:
    """The learning rate of most validation accuracy; the smaller of equals."""
    found = {}
    for lr in RATES[arm]:
        tried = [units.get(tried_name(arm, lr, seed)) for seed in SWEEP_SEEDS]
        found[lr] = sum(one["accuracy"] for one in tried if one)
    return max(found, key=found.__getitem__)


def tried_name(arm: str, lr: float, seed: int) -> str:
    return f"rate; {arm}; {lr:g}; {seed}"


def planned(options: argparse.Namespace, seeds: list[int]) -> dict[str, tuple[str, ...]]:
    """Every unit and the units it waits for, the most telling first."""
    found: dict[str, tuple[str, ...]] = {}
    sweep: tuple[str, ...] = ()
    if not options.quick and set(options.data) - {"lab"}:
        sweep = tuple(tried_name(a, lr, s) for a in RATES for lr in RATES[a] for s in SWEEP_SEEDS)
        found = dict.fromkeys(sweep, ())
    cells = [(d, n) for d in options.data for n in noises(d) if wanted(options, n)]
    order = [*list(NOISES)[1:3], FOUND, list(NOISES)[3], "none", *list(NOISES)[4:]]
    cells.sort(key=lambda cell: order.index(cell[1]))
    for data, noise in cells:
        for seed in seeds:
            for arm in arms(noise, options):
                needs = () if data == "lab" else sweep
                found[f"{data}; {noise}; {arm}; {seed}"] = needs
    return found


def wanted(options: argparse.Namespace, noise: str) -> bool:
    if options.noise:
        return noise in options.noise
    return not options.quick or noise in ("symmetric 40 %", FOUND)


def arms(noise: str, options: argparse.Namespace) -> list[str]:
    """The arms under a noise; to run cleanlab takes cleanlab."""
    found = ["LoRA", "CleaR"] if options.quick else list(ARMS)
    if noise == "none":
        found = [one for one in found if one != "oracle"]  # it is LoRA
    if not options.done and importlib.util.find_spec("cleanlab") is None:
        found = [one for one in found if one != "cleanlab"]
    return found


def gathered(units: Units) -> Found:
    """Arms by set and noise, of those that all seeds have."""
    found: Found = {}
    missing: set[tuple[str, str, str]] = set()
    for name in units.waits:
        if name.startswith("rate; "):
            continue
        data, noise, arm, _ = name.split("; ")
        result = units.get(name)
        if result is None:
            missing.add((data, noise, arm))
        else:
            found.setdefault((data, noise), {}).setdefault(arm, []).append(result)
    for data, noise, arm in missing:
        found.get((data, noise), {}).pop(arm, None)
    return found


def tables(found: Found, quick: bool) -> list[dict]:
    """Print what every arm reached and CleaR's differences; the results to keep."""
    print("| set | noise | arm | accuracy | memorised | AUC |", "\n|---|---|---|---|---|---|")
    for (data, noise), own in found.items():
        for arm, runs in own.items():
            means = [
                f"{np.mean([run[key] for run in runs]):.3f}" if key in runs[0] else ""
                for key in ("accuracy", "memorised", "auc")
            ]
            print(f"| {data} | {noise} | {arm} |", " | ".join(means), "|")
    print("\n| set | noise | accuracy of | difference | 95 % interval | seeds |")
    print("|---|---|---|---|---|---|")
    results = []
    for (data, noise), own in found.items():
        for first, other in pairs(own):
            both = zip(own[first], own[other], strict=True)
            values = [a["accuracy"] - b["accuracy"] for a, b in both]
            if len(values) < 2:
                continue
            gap = Estimate.from_items(
                {f"seed {k}": v for k, v in enumerate(values)}, metric="accuracy difference"
            )
            seeds = " ".join(f"{value:+.3f}" for value in values)
            interval = f"[{gap.low:+.3f}, {gap.high:+.3f}]"
            title = f"{first} minus {other}"
            print(f"| {data} | {noise} | {title} | {gap.value:+.3f} | {interval} | {seeds} |")
            claimed = not quick and noise != "none" and other in ("LoRA", "full")
            claimed = claimed and first == "CleaR"
            results.append(
                {
                    "name": f"{data}, {noise}: {title}, accuracy, low end of the 95 % interval",
                    "value": float(f"{gap.low:.4g}"),
                    "bound": "> 0" if claimed else None,
                    "holds": gap.low > 0 if claimed else True,
                    "unit": f"share of questions, {len(values)} seeds",
                }
            )
    return results


def pairs(own: dict[str, Any]) -> list[tuple[str, str]]:
    """The differences to tell: CleaR's to all others, and dropping's to plain LoRA and cleanlab."""
    found = [("CleaR", other) for other in own if other != "CleaR" and "CleaR" in own]
    return found + [("drop", other) for other in ("LoRA", "cleanlab") if {"drop", other} <= {*own}]


def main() -> None:
    """Parse, run what is missing, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a small case, under 45 s")
    parser.add_argument("--data", nargs="*", choices=SETS, help="sets (all; quick: lab)")
    parser.add_argument("--noise", nargs="*", choices=[*NOISES, FOUND], help="noises (all)")
    parser.add_argument("--seeds", type=int, help="number of seeds (5, quick 1)")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--device", default="cpu", help="where MiniLM and the lab's model run")
    parser.add_argument("--done", action="store_true", help="tell what --work holds, run nothing")
    parser.add_argument("--work", type=Path, help="folder to keep and resume the units in")
    options = parser.parse_args()
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the trainer takes a GPU where it sees one
    if not options.data:
        real = bool(os.environ.get("DELTALOOM_ASSETS")) and not options.quick
        options.data = list(SETS) if real else ["lab"]
    home = (options.work or Path(tempfile.mkdtemp(prefix="claims-clear-"))).resolve()
    seeds = [FIRST + k for k in range(options.seeds or (1 if options.quick else 5))]
    units = Units(home / "units", planned(options, seeds))
    if not options.done:
        units.run(partial(unit, home, options.device, options.quick), options.workers)
    if any(name.startswith("rate; ") for name in units.waits):
        for arm in RATES:
            print(f"MiniLM, {arm}: learning rate {chosen(units, arm):g} of {RATES[arm]}")
    print(f"{len(seeds)} seeds\n")
    results = tables(gathered(units), options.quick)
    print(json.dumps({"bench": "claims-clear", "results": results}))


if __name__ == "__main__":
    sys.exit(main())
