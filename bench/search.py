"""Searching: what is spent outside of trials, and the time of a coordinate check, on the lab.

    python bench/search.py [--quick] [--trials N]

`search width` on the lab's base (hidden size 128, four layers) with its defaults but for the number
of trials and the passes over the pool (three, as tuning has). "Outside" is all time of the search
but for training and measuring proxies: proposing, records, the Optuna study, and Optuna's import.
The coordinate check goes over three widths and two depths, with the rules and without.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

import deltaloom
from deltaloom.core.run import Run
from deltaloom.lab.files import write_lab

OUTSIDE = 0.02
CHECK = 60.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a small pool, two trials")
    parser.add_argument("--trials", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        lab = write_lab(home / "lab", 0, "small" if options.quick else "full")
        given = {"base": lab["base"], "data": lab["pool"]}
        trials, epochs = (2, 1.0) if options.quick else (options.trials, 3.0)
        out = home / "found"
        deltaloom.search(
            "width", **given, out=out, trials=trials, epochs=epochs, check_steps=0, holdout=0.02
        )
        notes = Run.read(out)["notes"]
        seconds = check(home, given)
    inside, outside = notes["trial_seconds"], notes["overhead_seconds"]
    print(f"{trials} trials: {inside:.1f} s, outside {outside:.2f} s")
    share = outside / inside
    print(f"coordinate check: {seconds:.1f} CPU s")
    judged = not options.quick
    results = [
        {"name": "time outside of trials over theirs", "value": round(share, 4),
         "bound": OUTSIDE if judged else None, "holds": share <= OUTSIDE or not judged,
         "unit": "ratio"},
        {"name": "coordinate check on the lab", "value": round(seconds, 2), "bound": CHECK,
         "holds": seconds <= CHECK, "unit": "CPU seconds"},
    ]  # fmt: skip
    print(json.dumps({"bench": "search", "results": results}))


def check(home: Path, given: dict[str, Path]) -> float:
    """CPU seconds that the coordinate check adds to one trial on few rows."""
    few = home / "few.jsonl"
    few.write_text("".join(given["data"].open(encoding="utf-8").readlines()[:40]), encoding="utf-8")
    spent = []
    for steps in (0, 4):
        begin = time.process_time()
        out, base = home / f"check{steps}", given["base"]
        deltaloom.search("width", base=base, data=few, out=out, trials=1, check_steps=steps)
        spent.append(time.process_time() - begin)
    return spent[1] - spent[0]


if __name__ == "__main__":
    main()
