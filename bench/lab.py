"""The quickstart over seeds: LESS's 5 % against a random 5 %, the full pool, and two merged deltas.

Each seed draws another pool, target, test and tuning; comparisons are paired by seed, the seed is
the random unit (`compare_seeds`).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from deltaloom.core.estimate import Estimate, compare_seeds, pool_seeds

QUICK = ["tuned-full.epochs=1", "tuned-random.epochs=2", "tuned-less.epochs=2"]
ARMS = ("base", "tuned-random", "tuned-less", "tuned-full")
SELECTION, FULL = ("less-5", "tuned-less"), ("tuned-full",)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed with fewer epochs")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=20, help="the lab was made on seeds below")
    parser.add_argument("--work", type=Path, help="folder to keep and resume the runs in")
    options = parser.parse_args()
    home = options.work or Path(tempfile.mkdtemp(prefix="deltaloom-lab-"))
    seeds = list(range(options.first, options.first + (1 if options.quick else options.seeds)))
    runs = [quickstart(home / f"seed{seed}", seed, options.quick) for seed in seeds]
    print(table(runs))
    results = [claim(runs), tokens(runs), *merged(runs), duration(runs)]
    print(json.dumps({"bench": "lab", "results": results}))


def quickstart(out: Path, seed: int, quick: bool) -> dict:
    """One quickstart through the command line, one thread; its record and estimates."""
    start = time.monotonic()
    words = ["quickstart", f"out={out}", f"seed={seed}", "--json", *(QUICK if quick else [])]
    text = subprocess.run(
        [sys.executable, "-m", "deltaloom", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ).stdout
    found = {
        (path.parent.parent.name, path.parent.name): Estimate.from_json(path.read_text())
        for path in sorted((out / "run").glob("*/*/estimate.json"))
    }
    steps = json.loads(text)["steps"]
    return {"estimates": found, "steps": steps, "seconds": time.monotonic() - start}


def of(runs: list[dict], step: str, label: str, task: str) -> list[Estimate]:
    """One estimate a seed."""
    return [run["estimates"][step, f"{label}--{task}"] for run in runs]


def claim(runs: list[dict]) -> dict:
    """LESS's 5 % beats a random 5 %: the lower end of the interval of the difference."""
    less, rest = (
        of(runs, "selection", arm, "test-birth") for arm in ("tuned-less", "tuned-random")
    )
    if len(runs) == 1:
        from deltaloom.core.estimate import compare

        low, unit = compare(less[0], rest[0]).difference.low, "accuracy, over people, one seed"
    else:
        low = compare_seeds(less, rest).difference.low
        unit = f"accuracy, low end of the 95 % interval over {len(runs)} seeds"
    name = "LESS's 5 % minus a random 5 %"
    return {"name": name, "value": low, "bound": "> 0", "holds": low > 0, "unit": unit}


def tokens(runs: list[dict]) -> dict:
    """Tokens through forward and backward, warm-up and gradient pass included, against full."""

    def spent(run: dict, steps: tuple[str, ...]) -> float:
        return sum(run["steps"][step]["cost"]["backward_tokens"] for step in steps)

    worst = max(spent(run, SELECTION) / spent(run, FULL) for run in runs)
    return {
        "name": "tokens of LESS's arm, selection included, over the full run's",
        "value": worst,
        "bound": "<= 0.2",
        "holds": worst <= 0.2,
        "unit": "ratio, the largest of the seeds",
    }


def merged(runs: list[dict]) -> list[dict]:
    """The merged model against each specialist on the task that is not its own."""
    rows = []
    for label, task in (("tuned-less-door", "test-birth"), ("tuned-less", "test-door")):
        if len(runs) == 1:
            break
        pair = [of(runs, "merging", one, task) for one in ("merged", label)]
        low = compare_seeds(*pair).difference.low
        rows.append(
            {
                "name": f"merged minus {label} on {task}",
                "value": low,
                "bound": "> 0",
                "holds": low > 0,
                "unit": "accuracy, low end of the 95 % interval over seeds",
            }
        )
    return rows


def duration(runs: list[dict]) -> dict:
    """Wall time of the slowest quickstart, one thread."""
    slowest = max(run["seconds"] for run in runs)
    return {
        "name": "quickstart, slowest seed",
        "value": slowest,
        "bound": "<= 240",
        "holds": slowest <= 240,
        "unit": "s",
    }


def table(runs: list[dict]) -> str:
    """Mean over seeds with its interval, and each seed's value."""
    cells = [("selection", arm, "test-birth") for arm in ARMS]
    cells += [
        ("merging", label, task)
        for task in ("test-birth", "test-door")
        for label in ("tuned-less", "tuned-less-door", "merged")
    ]
    lines = ["| model | task | accuracy | by seed |", "|---|---|---|---|"]
    for step, label, task in cells:
        seen = of(runs, step, label, task)
        text = (pool_seeds(seen) if len(seen) > 1 else seen[0]).summary()
        lines.append(f"| {label} | {task} | {text} | {', '.join(f'{e.value:.2f}' for e in seen)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
