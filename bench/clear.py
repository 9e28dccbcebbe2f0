"""CleaR's time beside the same LoRA training, without the passes that judge the labels.

    python bench/clear.py [--quick] [--repeats N]

CPU seconds of one thread, medians of alternating runs in this process, of the training alone
(`engine.train.fit`) over the same rows from the same weights. A story model of the assets learns
question types (TREC, one letter as the answer); an untrained model of the lab where
DELTALOOM_ASSETS is not set. The passes' time is measured inside the run, around each of them.
"beyond its passes" is (CleaR - passes) / LoRA; a pass is also given as a part of an epoch of LoRA.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from deltaloom.core.base import Base
from deltaloom.core.examples import Examples
from deltaloom.core.run import Run
from deltaloom.engine import train
from deltaloom.tune import _routing
from deltaloom.tune.clear import Clear
from deltaloom.tune.lora import Lora

BOUND = 1.2
MODEL = "models/storyfam-M"


def base_in(folder: Path) -> Base:
    """The story model, or one of its shape."""
    assets = os.environ.get("DELTALOOM_ASSETS")
    if assets:
        return Base(model=str(Path(assets) / MODEL), device="cpu")
    from deltaloom.lab.files import tiny_base

    tiny_base(folder)
    return Base(model=str(folder), device="cpu")


def rows_in(path: Path, count: int) -> Examples:
    """Questions of TREC, or made-up ones, with a letter as the answer."""
    assets = os.environ.get("DELTALOOM_ASSETS")
    if assets:
        file = Path(assets) / "data/classification_sentiment/TREC.train.all"
        lines = file.read_text("latin-1").splitlines()[:count]
    else:
        lines = [f"{i % 6} What is the name of thing number {i} of them ?" for i in range(count)]
    with open(path, "w", encoding="utf-8") as out:
        for line in lines:
            label, _, question = line.partition(" ")
            row = {"prompt": question + "\nAnswer:", "completion": " " + "abcdef"[int(label)]}
            out.write(json.dumps(row) + "\n")
    return Examples.read(path)


class Clock:
    """CPU seconds in training and, of those, in the passes that judge."""

    def __enter__(self) -> Clock:
        self.training = self.passes = 0.0
        self.fit, self.looked = train.fit, _routing.CleanRouting._looked

        def fit(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            found = self.fit(*args, **kwargs)
            self.training += time.process_time() - start
            return found

        def looked(*args: Any) -> Any:
            start = time.process_time()
            found = self.looked(*args)
            self.passes += time.process_time() - start
            return found

        train.fit, _routing.CleanRouting._looked = fit, looked
        return self

    def __exit__(self, *error: object) -> None:
        train.fit, _routing.CleanRouting._looked = self.fit, self.looked


def seconds(method: Any, base: Base, data: Examples, folder: Path) -> tuple[float, float]:
    """CPU seconds of a training, and those of its judging passes."""
    with Run.open(folder, {"steps": []}, {}, 0) as run, Clock() as clock:
        method.tune(base, data, run)
    return clock.training, clock.passes


def compared(kind: str, base: Base, data: Examples, repeats: int, epochs: int, work: Path) -> list:
    """One kind of rule beside plain LoRA."""
    shared = {"epochs": epochs, "batch_size": 16, "save_steps": 10**6}
    plain, clear = Lora(**shared), Clear(**shared, warm_up=1, rule=kind)
    pairs = []
    for number in range(repeats + 1):
        one = seconds(plain, base, data, work / f"plain-{kind}-{number}")[0]
        two, passes = seconds(clear, base, data, work / f"clear-{kind}-{number}")
        if number:  # the first warms up
            pairs.append((one, two, passes))
    lora, whole, passes = (statistics.median(column) for column in zip(*pairs, strict=True))
    beyond = statistics.median((two - looks) / one for one, two, looks in pairs)
    a_pass = statistics.median(looks / one for one, _, looks in pairs) * epochs / (epochs - 1)
    print(
        f"| {kind} | {lora:.2f} | {whole:.2f} | {passes:.2f} | {beyond:.3f} | {a_pass:.3f} |",
        flush=True,
    )
    what = f"{kind}, {len(data)} rows, {epochs} epochs"
    return [
        result(f"{what}: time beyond its passes / LoRA", beyond, BOUND),
        result(f"{what}: one pass over the data / an epoch of LoRA", a_pass, None),
    ]


def result(name: str, value: float, bound: float | None) -> dict[str, Any]:
    """One line; it holds when it is at most `bound`."""
    holds = bound is None or value <= bound
    return {
        "name": name,
        "value": float(f"{value:.4g}"),
        "bound": bound,
        "holds": holds,
        "unit": "ratio",
    }


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a small case, under 45 s")
    parser.add_argument("--repeats", type=int, help="runs of each (3, quick 1)")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    repeats = options.repeats or (1 if options.quick else 3)
    rows, epochs = (64, 2) if options.quick else (128, 3)
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {platform.machine()}\n")
    print("| rule | LoRA s | CleaR s | passes s | beyond / LoRA | pass / epoch |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="clear-") as scratch:
        work = Path(scratch)
        base, data = base_in(work / "base"), rows_in(work / "rows.jsonl", rows)
        results = []
        for kind in ("bypass",) if options.quick else ("bypass", "drop"):
            results += compared(kind, base, data, repeats, epochs, work)
    print(json.dumps({"bench": "clear", "results": results}))


if __name__ == "__main__":
    main()
