"""MeZO beside tuning by gradient, on prompt-style classification with a small real language model.

    DELTALOOM_ASSETS=DIR python bench/claims/mezo.py [--quick] [--seeds N] [--workers N]
        [--work DIR] [--done]

Sentences of at most 20 words of Subj (reviews or plots), asked as "SENTENCE It was a" and answered
" good" (of a review) or " story"; accuracy is over these two choices, the model TinyStories-656K.
Each arm's learning rate is the one of least validation loss among those listed here, on a training
set that is none of the seeds'; then five training sets of 1,000 rows, one test set.
All arms minimise the same loss on the same rows with a rate that falls linearly; MeZO's take 4,000
steps and the gradient arms 3 epochs. Intervals are Student's t over seeds, and differences are
paired by seed. Runs on the CPU, one thread a process.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any

from _seeds import over_seeds

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from _units import Units, plain

import deltaloom
from deltaloom.core.estimate import Estimate
from deltaloom.core.run import Run

MODEL = "models/TinyStories-656K"
DATA = "data/classification_sentiment/subj.all"
WORDS, ROWS, HELD_OUT = 20, 1000, 500
CHOICES = [" good", " story"]
"""Of a sentence with an opinion, of one that tells a plot: the file's 0 and 1."""
GRADIENT = {"epochs": 3, "batch_size": 16}
MEZO = {"steps": 4000, "batch_size": 16, "eps": 1e-3, "schedule": "linear"}
RATES = (1e-4, 2e-4, 4e-4, 8e-4)
ARMS: dict[str, tuple[str, dict[str, Any], tuple[float, ...]]] = {
    "full tuning": ("full", GRADIENT, (1e-3, 3e-3, 1e-2)),
    "LoRA": ("lora", GRADIENT, (3e-3, 1e-2, 3e-2)),
    "MeZO Gaussian": ("mezo", {**MEZO, "direction": "gaussian"}, RATES),
    "MeZO low-rank": ("mezo", {**MEZO, "direction": "lowrank"}, (*RATES, 1.6e-3)),
    "MeZO Rademacher": ("mezo", {**MEZO, "direction": "rademacher"}, RATES),
}
"""Arm -> method, settings, learning rates to choose from."""
SWEEP_SEEDS = (100,)
"""Training sets for the learning rates."""


def main() -> None:
    """Parse, run what is missing, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one seed, few steps, no claim")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--work", type=Path, help="folder to keep and resume the units in")
    parser.add_argument("--done", action="store_true", help="tell what --work holds, run nothing")
    options = parser.parse_args()
    if not os.environ.get("DELTALOOM_ASSETS"):
        print("DELTALOOM_ASSETS is not set: this bench needs a real model and data")
        print(json.dumps({"bench": "claims-mezo", "results": [], "skipped": "no DELTALOOM_ASSETS"}))
        return
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the trainer takes a GPU where it sees one
    home = (options.work or Path(tempfile.mkdtemp(prefix="claims-mezo-"))).resolve()
    seeds = range(1 if options.quick else options.seeds)
    sweeps = {arm: [] if options.quick else tried(arm) for arm in ARMS}
    waits: dict[str, tuple[str, ...]] = {"base": ()}
    for arm in ARMS:
        waits |= dict.fromkeys(sweeps[arm], ())
        waits |= {f"{arm}; {seed}": tuple(sweeps[arm]) for seed in seeds}
    units = Units(home / "units", waits)
    if not options.done:
        units.run(partial(unit, home, options.quick), options.workers)
    print(json.dumps({"bench": "claims-mezo", "results": judged(units, seeds, options.quick)}))


def tried(arm: str) -> list[str]:
    """The units of an arm's sweep."""
    return [f"rate; {arm}; {lr:g}; {seed}" for lr in ARMS[arm][2] for seed in SWEEP_SEEDS]


def swept(units: Units, arm: str) -> dict[float, float]:
    """Mean validation loss by learning rate."""
    losses = {}
    for lr in ARMS[arm][2]:
        found = [units.get(f"rate; {arm}; {lr:g}; {seed}") for seed in SWEEP_SEEDS]
        losses[lr] = sum(one["loss"] if one else float("inf") for one in found) / len(found)
    return losses


def chosen(units: Units, arm: str, quick: bool) -> float:
    """The learning rate of least mean validation loss."""
    losses = {} if quick else swept(units, arm)
    return min(losses, key=losses.__getitem__) if losses else ARMS[arm][2][0]


def unit(home: Path, quick: bool, name: str) -> dict[str, float]:
    """Make one unit: a rate tried, or an arm's result on one training set."""
    bench = Bench(home / "runs" / plain(name.replace("; ", "-")), quick)
    if name == "base":
        return {"accuracy": bench.measured("choice", "test", None)}
    units = Units(home / "units", {})
    if not name.startswith("rate; "):
        arm, seed = name.split("; ")
        return bench.reached(arm, chosen(units, arm, quick), int(seed))
    _, arm, lr, seed = name.split("; ")
    out = bench.tuned(arm, float(lr), int(seed))
    found = {"loss": bench.measured("loss", "validation", out), "seconds": seconds(out)}
    shutil.rmtree(bench.work)
    return found


class Bench:
    """The files and runs of one unit."""

    def __init__(self, work: Path, quick: bool) -> None:
        assets = Path(os.environ["DELTALOOM_ASSETS"]).resolve()
        self.work, self.quick = work, quick
        self.base = {"model": str(assets / MODEL), "device": "cpu"}
        work.mkdir(parents=True, exist_ok=True)
        rows = questions(assets / DATA)
        random.Random("subj").shuffle(rows)
        held = 60 if quick else HELD_OUT
        self.files = {
            "validation": self.written("validation", rows[:held]),
            "test": self.written("test", rows[HELD_OUT : HELD_OUT + held]),
        }
        self.pool = rows[2 * HELD_OUT :]

    def written(self, name: str, rows: list[dict]) -> Path:
        """Rows as a file."""
        path = self.work / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    def tuned(self, arm: str, lr: float, seed: int) -> Path:
        """The folder of the run, made or found."""
        method, settings, _ = ARMS[arm]
        rows = random.Random(seed).sample(self.pool, 64 if self.quick else ROWS)
        data, out = self.written("train", rows), self.work / "tuned"
        if self.quick and method == "mezo":
            settings = {**settings, "steps": 20}
        deltaloom.tune(method, base=self.base, data=data, out=out, lr=lr, seed=seed, **settings)
        return out

    def measured(self, method: str, part: str, delta: Path | None) -> float:
        """One measurement, of the base when there is no delta."""
        out = self.work / f"{method}-{part}"
        given = {} if delta is None else {"deltas": [str(delta)]}
        data = str(self.files[part])
        found = deltaloom.measure(method, base=self.base, tasks=[data], out=out, **given)
        return next(iter(found.values())).value

    def reached(self, arm: str, lr: float, seed: int) -> dict[str, float]:
        """Test accuracy and loss, the rate, and CPU seconds of the tuning."""
        out = self.tuned(arm, lr, seed)
        found = {
            "accuracy": self.measured("choice", "test", out),
            "loss": self.measured("loss", "test", out),
            "lr": lr,
            "seconds": seconds(out),
        }
        shutil.rmtree(self.work)
        return found


def seconds(out: Path) -> float:
    """CPU seconds of a run."""
    return Run.read(out)["cost"]["cpu_seconds"]


def judged(units: Units, seeds: range, quick: bool) -> list[dict[str, Any]]:
    """Tables and results of the arms that all seeds have."""
    base = units.get("base")
    results = []
    if base:
        print(f"base: accuracy {base['accuracy']:.3f}\n")
        results.append(row("base: test accuracy", base["accuracy"], "share"))
    found: dict[str, list[dict[str, float]]] = {}
    for arm in ARMS:
        own = [one for seed in seeds if (one := units.get(f"{arm}; {seed}"))]
        if len(own) == len(seeds):
            found[arm] = own
    print("| arm | validation loss by learning rate |\n|---|---|")
    for arm in () if quick else ARMS:
        losses = ", ".join(
            f"{lr:g}: {loss:.3f}" if isfinite(loss) else f"{lr:g}: not run"
            for lr, loss in swept(units, arm).items()
        )
        print(f"| {arm} | {losses} |")
    print("\n| arm | accuracy | loss | lr | CPU s | accuracy by seed |\n|---|---|---|---|---|---|")
    for arm, own in found.items():
        accuracy, loss = (over_seeds([one[k] for one in own]) for k in ("accuracy", "loss"))
        spent = sum(one["seconds"] for one in own) / len(own)
        by_seed = " ".join(f"{one['accuracy']:.3f}" for one in own)
        print(
            f"| {arm} | {shown(accuracy)} | {shown(loss)} | {own[0]['lr']:g} | {spent:.0f} "
            f"| {by_seed} |"
        )
        results += [
            row(f"{arm}: test accuracy", accuracy.value, "share"),
            row(f"{arm}: test loss", loss.value, "nats a token"),
            row(f"{arm}: CPU seconds of tuning", spent, "s"),
        ]
    print("\n| difference | accuracy | loss |\n|---|---|---|")
    names = [*found]
    for number, first in enumerate(names):
        for other in names[number + 1 :]:
            gaps = []
            for key in ("accuracy", "loss"):
                pairs = zip(found[first], found[other], strict=True)
                gap = over_seeds([a[key] - b[key] for a, b in pairs])
                gaps.append(shown(gap, "+"))
                name = f"{key}, {first} - {other}, [{gap.low:.3f}, {gap.high:.3f}]"
                results.append(row(name, gap.value, "difference"))
            print(f"| {first} - {other} | {' | '.join(gaps)} |")
    return results


def questions(path: Path) -> list[dict[str, Any]]:
    """Short sentences as rows, in the file's order, each text once."""
    found: dict[str, dict[str, Any]] = {}
    for line in path.read_text(encoding="latin-1").splitlines():
        label, _, sentence = line.partition(" ")
        if len(sentence.split()) <= WORDS:
            text = f"{sentence.strip()} It was a"
            found[text] = {
                "prompt": text,
                "completion": CHOICES[int(label)],
                "choices": CHOICES,
                "answer": int(label),
            }
    return list(found.values())


def shown(one: Estimate, sign: str = "") -> str:
    return f"{one.value:{sign}.3f} [{one.low:{sign}.3f}, {one.high:{sign}.3f}]"


def row(name: str, value: float, unit: str) -> dict[str, Any]:
    """One figure; which arm is ahead is told, not claimed beforehand."""
    value = float(f"{value:.4g}")
    return {"name": name, "value": value, "bound": None, "holds": True, "unit": unit}


if __name__ == "__main__":
    sys.exit(main())
