"""DELIFT's 30 % of a real pool against a random 30 % and the whole pool.

    DELTALOOM_ASSETS=DIR python bench/delift.py [--quick] [--seeds N] [--work DIR]

The pool and the test rows are the same mixture of real sources, drawn anew for each seed (test rows
of the other side of the border, see `_data.py`). Every arm tunes with the same settings for the
same number of epochs, so the whole pool gets 3.3 times the steps, as in the paper. The measure is
the loss per response token; its interval is over seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
from pathlib import Path

from _data import read_sources
from selection import by_seed, difference, estimate, interval, run, seconds

MODEL = "models/TinyStories-656K"
TUNE = {"method": "lora", "lr": 1e-2, "epochs": 3, "batch_size": 8, "max_length": 192}
"""Those of the main job's bench."""
FRACTION = 0.3
"""The paper's (section 4)."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one seed of a small pool")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=320, help="rows of the pool")
    parser.add_argument("--work", type=Path, help="folder to keep and resume the runs in")
    options = parser.parse_args()
    if not os.environ.get("DELTALOOM_ASSETS"):
        print("DELTALOOM_ASSETS is not set: this bench needs a real model and data")
        print(json.dumps({"bench": "delift", "results": [], "skipped": "no DELTALOOM_ASSETS"}))
        return
    assets = Path(os.environ["DELTALOOM_ASSETS"]).resolve()
    work = (options.work or Path(tempfile.mkdtemp(prefix="deltaloom-delift-"))).resolve()
    sources = read_sources(assets)
    rows, tests = (60, 30) if options.quick else (options.rows, 300)
    folders = []
    for seed in range(1 if options.quick else options.seeds):
        home = work / f"seed{seed}"
        pool, test = draw(sources, home, seed, rows, tests)
        run(recipe(str(assets / MODEL), pool, test, seed), home)
        folders.append(home)
    results = [] if options.quick else judged(folders)
    print(json.dumps({"bench": "delift", "results": results}))


def draw(sources: dict, home: Path, seed: int, rows: int, tests: int) -> tuple[str, str]:
    """Pool and test: the same number of rows of every source."""
    home.mkdir(parents=True, exist_ok=True)
    dice = random.Random(seed)
    parts: tuple[list, list] = ([], [])
    for name in sorted(sources):
        found = list(sources[name])
        dice.shuffle(found)
        abouts = sorted({row["about"] for row in found})
        dice.shuffle(abouts)
        held_out = set(abouts[: len(abouts) // 3])
        sides = (
            [r for r in found if r["about"] not in held_out],
            [r for r in found if r["about"] in held_out],
        )
        for part, side, total in zip(parts, sides, (rows, tests), strict=True):
            part += side[: total // len(sources)]
    names = []
    for part, name in zip(parts, ("pool", "test"), strict=True):
        dice.shuffle(part)
        path = home / f"{name}.jsonl"
        keys = ("source", "prompt", "completion")
        lines = [json.dumps({key: row[key] for key in keys}) + "\n" for row in part]
        path.write_text("".join(lines), encoding="utf-8")
        names.append(str(path))
    return names[0], names[1]


def recipe(base: str, pool: str, test: str, seed: int) -> dict:
    """Select in each way, tune on each and on the whole pool, measure."""
    one = {"pool": pool, "fraction": FRACTION}
    delift = {"method": "delift", **one}
    steps: list[dict] = [
        # A seed of its own, as other parts of the recipe draw by the recipe's.
        {"select": {"method": "random", "name": "random", **one, "seed": 1000 + seed}},
        {"select": {**delift, "name": "delift"}},
    ]
    data = {"random": "random", "delift": "delift", "full": pool}
    steps += [{"tune": {**TUNE, "name": f"tuned-{n}", "data": d}} for n, d in data.items()]
    steps.append({"measure": {"method": "loss", "name": "measured", "tasks": [test],
                              "deltas": ["base", *(f"tuned-{n}" for n in data)]}})  # fmt: skip
    return {"base": base, "seed": seed, "steps": steps}


def judged(folders: list[Path]) -> list[dict]:
    """The arms, and DELIFT against random rows and the whole pool."""
    arms = ("base", "tuned-random", "tuned-delift", "tuned-full")
    found = {arm: [estimate(home, arm, "test") for home in folders] for arm in arms}
    print("| rows | loss, nats per token | by seed |\n|---|---|---|")
    for arm in arms:
        print(f"| {arm} | {interval(found[arm])} | {by_seed(found[arm])} |")
    print(f"\nDELIFT's selection took {seconds(folders, 'delift'):.0f} CPU s a seed, tuning on "
          f"the whole pool {seconds(folders, 'tuned-full'):.0f}.")  # fmt: skip
    print("\n| difference | value | 95 % interval |\n|---|---|---|")
    results = []
    for other, bound in (("tuned-random", "< 0"), ("tuned-full", None)):
        gap = difference(found["tuned-delift"], found[other])
        print(
            f"| tuned-delift minus {other} | {gap.value:+.4f} | [{gap.low:+.4f}, {gap.high:+.4f}] |"
        )
        results.append({
            "name": f"DELIFT 30 % minus {other}: upper end of the 95 % interval",
            "value": round(gap.high, 4), "bound": bound,
            "holds": gap.high < 0 if bound else True, "unit": "nats per token"})  # fmt: skip
    gap = difference(found["tuned-delift"], found["tuned-full"])
    kept = gap.low <= 0
    results.append({"name": "DELIFT 30 % keeps the whole pool's quality within the interval",
                    "value": round(gap.low, 4), "bound": "<= 0", "holds": kept,
                    "unit": "nats per token, lower end of the difference"})  # fmt: skip
    return results


if __name__ == "__main__":
    main()
