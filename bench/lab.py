"""The quickstart over seeds: LESS's 5 % against a random 5 %, the full pool, and two merged deltas.

Each seed draws another pool, other people to be asked about, another target and tuning. The seed
is the random unit: values and differences are taken within a seed, intervals are Student's t over
seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from deltaloom.core.estimate import Estimate, compare
from deltaloom.lab.files import write_lab

ARMS = ("base", "tuned-random", "tuned-less", "tuned-full")
TASKS = ("test-birth", "test-door")
SELECTION, FULL = ("less-5", "tuned-less"), ("tuned-full",)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed on a small pool")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=20, help="the lab was made on seeds below")
    parser.add_argument("--work", type=Path, help="folder to keep and resume the runs in")
    options = parser.parse_args()
    home = options.work or Path(tempfile.mkdtemp(prefix="deltaloom-lab-"))
    seeds = list(range(options.first, options.first + (1 if options.quick else options.seeds)))
    runs = [quickstart(home / f"seed{seed}", seed, options.quick) for seed in seeds]
    print(table(runs))
    results = [claim(runs), tokens(runs), *merged(runs), duration(runs)]
    if options.quick:  # a pool of 300 rows shows that it runs, and nothing else
        results = [{**one, "bound": None, "holds": True} for one in results]
    print(json.dumps({"bench": "lab", "results": results}))


def quickstart(out: Path, seed: int, quick: bool) -> dict:
    """One quickstart through the command line, one thread; its record and estimates."""
    words = ["quickstart", f"out={out}", f"seed={seed}", "--json"]
    if quick:
        pool = write_lab(out.with_name("small"), seed, size="small")["pool"]
        steps = ("random-5.pool", "less-5.pool", "less-5-door.pool", "tuned-full.data")
        words += [f"{step}={pool}" for step in steps]
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
        for path in sorted((out / "quickstart").glob("*/*/estimate.json"))
    }
    record = json.loads(text)
    # The ledger's time, so that runs resumed from --work tell what they took.
    return {"estimates": found, "steps": record["steps"], "seconds": record["cost"]["cpu_seconds"]}


def of(runs: list[dict], step: str, label: str, task: str) -> list[Estimate]:
    """One estimate a seed."""
    return [run["estimates"][step, f"{label}--{task}"] for run in runs]


def over_seeds(values: list[float], metric: str) -> Estimate:
    """The mean of one value a seed."""
    return Estimate.from_items({f"seed {k}": v for k, v in enumerate(values)}, metric=metric)


def difference(runs: list[dict], step: str, a: str, b: str, task: str) -> Estimate:
    """a minus b: over seeds, or over people when there is one seed."""
    pairs = list(zip(of(runs, step, a, task), of(runs, step, b, task), strict=True))
    if len(pairs) == 1:
        return compare(*pairs[0]).difference
    return over_seeds([x.value - y.value for x, y in pairs], "accuracy difference")


def claim(runs: list[dict]) -> dict:
    """LESS's 5 % beats a random 5 %: the lower end of the interval of the difference."""
    low = difference(runs, "selection", "tuned-less", "tuned-random", "test-birth").low
    return {
        "name": "LESS's 5 % minus a random 5 %",
        "value": low,
        "bound": "> 0",
        "holds": low > 0,
        "unit": f"accuracy, low end of the 95 % interval, {len(runs)} seeds",
    }


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
        low = difference(runs, "merging", "merged", label, task).low
        rows.append(
            {
                "name": f"merged minus {label} on {task}",
                "value": low,
                "bound": "> 0",
                "holds": low > 0,
                "unit": f"accuracy, low end of the 95 % interval, {len(runs)} seeds",
            }
        )
    return rows


def duration(runs: list[dict]) -> dict:
    """CPU time of the slowest quickstart's steps, one thread: what others do there is not in it."""
    slowest = max(run["seconds"] for run in runs)
    return {
        "name": "quickstart, all steps, slowest seed",
        "value": slowest,
        "bound": "<= 240",
        "holds": slowest <= 240,
        "unit": "CPU s on one thread",
    }


def table(runs: list[dict]) -> str:
    """Mean over seeds with its interval, and each seed's value."""
    cells = [("selection", arm, "test-birth") for arm in ARMS]
    cells += [
        ("merging", label, task)
        for task in TASKS
        for label in ("tuned-less", "tuned-less-door", "merged")
    ]
    lines = ["| model | task | accuracy | by seed |", "|---|---|---|---|"]
    for step, label, task in cells:
        seen = of(runs, step, label, task)
        one = seen[0] if len(seen) == 1 else over_seeds([e.value for e in seen], "accuracy")
        text = f"{one.value:.3f} [{one.low:.3f}, {one.high:.3f}]"
        lines.append(f"| {label} | {task} | {text} | {', '.join(f'{e.value:.2f}' for e in seen)} |")
    pairs = [
        ("selection", "tuned-less", other, "test-birth") for other in ("tuned-random", "tuned-full")
    ]
    pairs += [("merging", "merged", o, t) for o in ("tuned-less", "tuned-less-door") for t in TASKS]
    lines += ["", "| difference | task | value |", "|---|---|---|"]
    for step, a, b, task in pairs:
        one = difference(runs, step, a, b, task)
        lines.append(f"| {a} - {b} | {task} | {one.value:+.3f} [{one.low:+.3f}, {one.high:+.3f}] |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
