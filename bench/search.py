"""Searching: what is spent outside of trials, and the time of a coordinate check, on the lab.

    python bench/search.py [--quick] [--trials N]

`search width` and `search autopeft` on the lab's base (hidden size 128, four layers) with their
defaults but for the number of trials and the passes over the pool, so that a trial takes some tens
of seconds. "Outside" is all time of the search but for trials (training and measuring): proposing,
records, the Optuna study, and Optuna's import. It is the same for longer trials, and grows slowly
with their number; half of the trials are proposed by the Gaussian process. The coordinate check
goes over three widths and two depths, with the rules and without.
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
EPOCHS = {"width": 6.0, "autopeft": 3.0}
"""Passes over the pool; a proxy of width is the smaller model."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a small pool, two trials")
    parser.add_argument("--trials", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    judged = not options.quick
    results = []
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        lab = write_lab(home / "lab", 0, "full" if judged else "small")
        given = {"base": lab["base"], "data": lab["pool"], "holdout": 0.02}
        for method, epochs in EPOCHS.items():
            trials = options.trials if judged else 2
            more = {"check_steps": 0} if method == "width" else {}
            more |= {"trials": trials, "epochs": epochs if judged else 1.0}
            deltaloom.search(method, **given, out=home / method, **more)
            notes = Run.read(home / method)["notes"]
            inside, outside = notes["trial_seconds"], notes["overhead_seconds"]
            print(f"{method}: {trials} trials, {inside:.1f} s, outside {outside:.2f} s")
            share, each = outside / inside, outside / trials
            results += [
                {"name": f"{method}: time outside of trials over theirs", "value": round(share, 4),
                 "bound": OUTSIDE if judged else None, "holds": share <= OUTSIDE or not judged,
                 "unit": f"ratio, trials of {inside / trials:.1f} s"},
                {"name": f"{method}: time outside of trials, for each", "value": round(each, 3),
                 "bound": None, "holds": True, "unit": "seconds"},
            ]  # fmt: skip
        seconds = check(home, {"base": lab["base"], "data": lab["pool"]})
    print(f"coordinate check: {seconds:.1f} CPU s")
    results.append({"name": "coordinate check on the lab", "value": round(seconds, 2),
                    "bound": CHECK, "holds": seconds <= CHECK, "unit": "CPU seconds"})  # fmt: skip
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
