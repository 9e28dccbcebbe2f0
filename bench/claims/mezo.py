"""MeZO beside tuning by gradient, on prompt-style sentiment with a small real language model.

    DELTALOOM_ASSETS=DIR python bench/claims/mezo.py [--quick] [--seeds N] [--work DIR]

SST-2 sentences of at most 14 words, asked as "SENTENCE It was" and answered " good" or " bad";
accuracy is over these two choices. Each arm's learning rate is the one of least mean validation
loss among those listed here, on three training sets that are none of the seeds'; then five
training sets of 512 rows, one test set. All arms minimise the same loss on the same rows; MeZO's
take 22 epochs and the gradient arms 3. Intervals are Student's t over seeds, and differences are
paired by seed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

import deltaloom
from deltaloom.core.estimate import Estimate
from deltaloom.core.run import Run

MODEL = "models/TinyStories-656K"
DATA = "data/classification_sentiment/stsa.binary."
WORDS, ROWS, HELD_OUT = 14, 512, 400
STEPS = 700
GRADIENT = {"epochs": 3, "batch_size": 16}
MEZO = {"steps": STEPS, "batch_size": 16, "eps": 1e-3, "max_length": 64}
ARMS: dict[str, tuple[str, dict[str, Any], tuple[float, ...]]] = {
    "full tuning": ("full", GRADIENT, (1e-3, 3e-3, 1e-2)),
    "LoRA": ("lora", GRADIENT, (3e-3, 1e-2, 3e-2)),
    "MeZO low-rank": ("mezo", {**MEZO, "direction": "lowrank"}, (1e-4, 3e-4, 1e-3)),
    "MeZO Rademacher": ("mezo", {**MEZO, "direction": "rademacher"}, (1e-4, 3e-4, 1e-3)),
    "MeZO Gaussian": ("mezo", {**MEZO, "direction": "gaussian"}, (1e-4, 3e-4, 1e-3)),
}
"""Arm -> method, settings, learning rates to choose from."""
SWEEP_SEEDS = (100, 101, 102)
"""Training sets for the learning rates; MeZO diverges on one set at a rate that suits another."""


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one seed, few steps, no claim")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--work", type=Path, help="folder to keep and resume the runs in")
    options = parser.parse_args()
    if not os.environ.get("DELTALOOM_ASSETS"):
        print("DELTALOOM_ASSETS is not set: this bench needs a real model and data")
        print(json.dumps({"bench": "claims-mezo", "results": [], "skipped": "no DELTALOOM_ASSETS"}))
        return
    torch.set_num_threads(1)
    assets = Path(os.environ["DELTALOOM_ASSETS"]).resolve()
    work = (options.work or Path(tempfile.mkdtemp(prefix="deltaloom-claims-mezo-"))).resolve()
    bench = Bench(assets, work, options.quick)
    rates = {arm: bench.chosen_rate(arm) for arm in ARMS}
    seeds = range(1 if options.quick else options.seeds)
    found = {arm: [bench.accuracy(arm, rates[arm], seed) for seed in seeds] for arm in ARMS}
    print(json.dumps({"bench": "claims-mezo", "results": bench.judged(found)}))


class Bench:
    """The study's files and runs."""

    def __init__(self, assets: Path, work: Path, quick: bool) -> None:
        self.base, self.work, self.quick = assets / MODEL, work, quick
        self.work.mkdir(parents=True, exist_ok=True)
        self.pool = questions(assets / f"{DATA}train")
        self.validation = self.written("validation", questions(assets / f"{DATA}dev"))
        self.test = self.written("test", questions(assets / f"{DATA}test"))

    def written(self, name: str, rows: list[dict]) -> Path:
        """The first rows as a file."""
        path = self.work / f"{name}.jsonl"
        rows = rows[: 60 if self.quick else HELD_OUT]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    def tuned(self, arm: str, lr: float, seed: int) -> Path:
        """The folder of one run, made or found."""
        method, settings, _ = ARMS[arm]
        rows = random.Random(seed).sample(self.pool, 64 if self.quick else ROWS)
        path = self.work / f"train-{seed}.jsonl"
        if not path.exists():
            path.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
        out = self.work / f"{arm.replace(' ', '-')}-{lr:g}-{seed}"
        if self.quick and method == "mezo":
            settings = {**settings, "steps": 20}
        deltaloom.tune(method, base=self.base, data=path, out=out, lr=lr, seed=seed, **settings)
        return out

    def measured(self, method: str, data: Path, delta: Path | None) -> Estimate:
        """One measurement, of the base when there is no delta."""
        out = self.work / f"{method}-{data.stem}-{delta.name if delta else 'base'}"
        given = {} if delta is None else {"deltas": [str(delta)]}
        found = deltaloom.measure(method, base=self.base, tasks=[str(data)], out=out, **given)
        return next(iter(found.values()))

    def chosen_rate(self, arm: str) -> float:
        """The learning rate of least mean validation loss on the sweep's training sets."""
        losses = {}
        for lr in ARMS[arm][2][: 1 if self.quick else None]:
            tuned = [self.tuned(arm, lr, seed) for seed in SWEEP_SEEDS[: 1 if self.quick else None]]
            found = [self.measured("loss", self.validation, out).value for out in tuned]
            losses[lr] = sum(found) / len(found)
        best = min(losses, key=losses.__getitem__)
        shown = ", ".join(f"{lr:g}: {loss:.3f}" for lr, loss in losses.items())
        print(f"{arm}: validation loss by lr {shown}; taken {best:g}", flush=True)
        return best

    def accuracy(self, arm: str, lr: float, seed: int) -> dict[str, float]:
        """Test accuracy and loss of one seed, and CPU seconds of its tuning."""
        out = self.tuned(arm, lr, seed)
        return {
            "accuracy": self.measured("choice", self.test, out).value,
            "loss": self.measured("loss", self.test, out).value,
            "seconds": Run.read(out)["cost"]["cpu_seconds"],
        }

    def judged(self, found: dict[str, list[dict[str, float]]]) -> list[dict[str, Any]]:
        """Table and results: a claim is a difference whose interval has a side."""
        base = self.measured("choice", self.test, None)
        print(f"base: accuracy {base.summary()}")
        results = [row("base: test accuracy", base.value, None, "share")]
        for arm, own in found.items():
            accuracy, loss = (over_seeds([one[k] for one in own]) for k in ("accuracy", "loss"))
            seconds = sum(one["seconds"] for one in own) / len(own)
            print(
                f"{arm}: accuracy {shown(accuracy)}, loss {shown(loss)}, {seconds:.0f} CPU s; "
                "by seed " + ", ".join(f"{one['accuracy']:.3f}" for one in own)
            )
            results += [
                row(f"{arm}: test accuracy", accuracy.value, None, "share"),
                row(f"{arm}: test loss", loss.value, None, "nats a token"),
                row(f"{arm}: CPU seconds of tuning", seconds, None, "s"),
            ]
        low_rank = found["MeZO low-rank"]
        for arm in (one for one in found if one != "MeZO low-rank"):
            for key in ("accuracy", "loss"):
                pairs = zip(low_rank, found[arm], strict=True)
                gap = over_seeds([a[key] - b[key] for a, b in pairs])
                print(f"MeZO low-rank - {arm}: {key} {shown(gap)}")
                name = f"{key}, MeZO low-rank - {arm}, [{gap.low:.3f}, {gap.high:.3f}]"
                results.append(row(name, gap.value, None, "difference"))
        return results


def questions(path: Path) -> list[dict[str, Any]]:
    """Short sentences as rows, in the file's order."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        label, _, sentence = line.partition(" ")
        if len(sentence.split()) <= WORDS:
            choices = [" bad", " good"]
            found.append(
                {
                    "prompt": f"{sentence.strip()} It was",
                    "completion": choices[int(label)],
                    "choices": choices,
                    "answer": int(label),
                }
            )
    return found


def over_seeds(values: list[float]) -> Estimate:
    """The mean of one value a seed, with Student's t interval."""
    return Estimate.from_items({f"seed {k}": v for k, v in enumerate(values)}, metric="mean")


def shown(one: Estimate) -> str:
    return f"{one.value:.3f} [{one.low:.3f}, {one.high:.3f}]"


def row(name: str, value: float, bound: float | None, unit: str) -> dict[str, Any]:
    """One result; it holds when it is at most `bound`."""
    holds = bound is None or value <= bound
    value = float(f"{value:.4g}")
    return {"name": name, "value": value, "bound": bound, "holds": holds, "unit": unit}


if __name__ == "__main__":
    main()
