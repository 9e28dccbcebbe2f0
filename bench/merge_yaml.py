"""mergekit's YAML, whole command: CPU seconds and peak memory of ours and of mergekit on one file.

    python bench/merge_yaml.py [--quick] [--peer-python PATH] [--repeats N]

The models and jobs of `merge.py`. Ours is `deltaloom mergekit` as it is by default, rounding every
step as mergekit does; both run in turn with two threads, and medians are compared. Where nothing
depends on sorts, draws or threads, the outputs are compared to the bit as well.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

from merge import FULL, JOBS, MEMORY_RATIO, SMALL, Cost, cost, make_models, median, row, show

from deltaloom.core.tensors import TensorFolder
from deltaloom.merge._formats import same_bytes

OURS = [sys.executable, "-m", "deltaloom", "mergekit"]
EQUAL = ("linear", "task_arithmetic")
"""Jobs that are compared to the bit; the others have mergekit's unstable sorts, its draws, or sums
that it cuts by threads."""


def document(job: str, models: list[Path], file: Path) -> None:
    """Write a job's YAML."""
    _, _, method, parameters, places, _ = JOBS[job]
    own = {key: value for key, value in parameters.items() if key == "density"}
    config = {
        "merge_method": method,
        "dtype": "bfloat16",
        "models": [{"model": str(models[i]), "parameters": {"weight": 1.0, **own}} for i in places],
        "parameters": {key: value for key, value in parameters.items() if key != "density"},
    }
    if method == "slerp":  # of its two models one is the base, and neither has a weight
        config["models"] = [{"model": str(models[i])} for i in places]
    if method != "linear":
        config["base_model"] = str(models[places[0] if method == "slerp" else 0])
    file.write_text(json.dumps(config))  # JSON is YAML


def merged(words: list[str], file: Path, out: Path) -> Cost:
    """One whole command."""
    shutil.rmtree(out, ignore_errors=True)
    return cost([*words, str(file), str(out), "--num-threads", "2", "--no-copy-tokenizer"])


def unequal(ours: Path, theirs: Path) -> float:
    """The share of tensors that are not equal to the bit."""
    a, b = TensorFolder(ours), TensorFolder(theirs)
    names = set(a) | set(b)
    return sum(not (n in a and n in b and same_bytes(a, n, b, n)) for n in names) / len(names)


def main() -> None:
    """Parse, make the models, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a small case, under 45 s")
    parser.add_argument("--peer-python", help="interpreter with mergekit 0.1.5")
    parser.add_argument("--repeats", type=int, help="runs per job (3, quick 1)")
    options = parser.parse_args()
    python, results = options.peer_python, []
    theirs = [python, str(Path(python).with_name("mergekit-yaml"))] if python else []
    if not python:
        print("no --peer-python: the ratios to mergekit are left out")
    with tempfile.TemporaryDirectory(prefix="bench-merge-yaml-") as folder:
        work = Path(folder)
        models = make_models(work, SMALL if options.quick else FULL)
        print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
        for job in JOBS:
            file = work / f"{job}.yml"
            document(job, models, file)
            merged(OURS, file, work / "ours")  # compiles the loops
            mine, peers = [], []
            for _ in range(options.repeats or (1 if options.quick else 3)):
                if theirs:
                    peers.append(merged(theirs, file, work / "theirs"))
                mine.append(merged(OURS, file, work / "ours"))
            show(job, "ours", mine)
            if not theirs:
                results.append(row(f"{job}: cpu", median(mine, "cpu"), None, "s"))
                continue
            show(job, "mergekit", peers)
            ratio = median(mine, "cpu") / median(peers, "cpu")
            results.append(row(f"{job}: cpu / mergekit", ratio, None, "ratio"))
            ratio = median(mine, "rss") / median(peers, "rss")
            results.append(row(f"{job}: memory / mergekit", ratio, MEMORY_RATIO, "ratio"))
            if job in EQUAL:
                share = unequal(work / "ours", work / "theirs")
                results.append(row(f"{job}: tensors not equal to the bit", share, 0.0, "share"))
    print(json.dumps({"bench": "merge_yaml", "results": results}))


if __name__ == "__main__":
    main()
