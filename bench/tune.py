"""Tuning under constraints: what a step costs in time and memory, beside the usual ways.

    python bench/tune.py [--quick] [--only PART ...]

CPU seconds of one thread; the sides take turns in one process, and a ratio is the median over the
rounds of the ratios within a round. Memory is the peak resident set of a process of its own over
what it held before the model was made. Each part is a module `_tune_PART.py` with one function,
`rows`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

HERE = Path(__file__).parent


def main() -> None:
    """Parse, run the parts, print."""
    parts = sorted(path.stem.removeprefix("_tune_") for path in HERE.glob("_tune_*.py"))
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small cases, under 45 s")
    parser.add_argument("--only", nargs="*", choices=parts, help="parts to run")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {platform.machine()}, "
        f"torch {torch.__version__}, one thread"
    )
    results = []
    for part in options.only or parts:
        results += importlib.import_module(f"_tune_{part}").rows(options.quick)
    print(json.dumps({"bench": "tune", "results": results}))


if __name__ == "__main__":
    main()
