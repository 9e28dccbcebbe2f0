"""RegMean and Fisher merging against the plain average, on specialists of a real story model.

    DELTALOOM_ASSETS=DIR python bench/claims/merge_with_data.py [--quick] [--seeds N] [--work DIR]

Three specialists of stories260K (full tuning on fables, on tales and on Shakespeare) are merged in
every way, the data of a merge being the rows that each specialist was tuned on. Measured is the
loss per token on held-out rows of the three, and its mean. A seed draws other rows and another
order of tuning; values are compared within a seed, intervals are Student's t over seeds. Settings
of the methods are their defaults; beside RegMean's alpha of 0.9 stands 0.1, which its authors'
configurations have too, and beside Fisher's drawn labels the data's.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

import deltaloom
from deltaloom.core.estimate import Estimate

MODEL = "models/stories260K"
TUNE = {"method": "full", "lr": 1e-3, "epochs": 3, "batch_size": 8, "max_length": 192}
DOMAINS = ("fables", "tales", "shakespeare")
ARMS = {
    "average": {"method": "average"},
    "regmean": {"method": "regmean"},
    "regmean-0.1": {"method": "regmean", "alpha": 0.1},
    "fisher": {"method": "fisher"},
    "fisher-data": {"method": "fisher", "labels": "data"},
}
CLAIMS = ("regmean", "fisher")
CHARACTERS = 480
"""Of a row, about 200 tokens of the model's tokenizer."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one seed of few rows")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", type=Path, help="folder to keep and resume the runs in")
    options = parser.parse_args()
    if not os.environ.get("DELTALOOM_ASSETS"):
        print("DELTALOOM_ASSETS is not set: this bench needs a real model and data")
        print(json.dumps({"bench": "merge_with_data", "results": [], "skipped": "no assets"}))
        return
    torch.set_num_threads(1)
    assets = Path(os.environ["DELTALOOM_ASSETS"]).resolve()
    work = (options.work or Path(tempfile.mkdtemp(prefix="deltaloom-merging-"))).resolve()
    train, test = (24, 12) if options.quick else (300, 120)
    texts = {name: list(read(assets / "data", name)) for name in DOMAINS}
    losses = []
    for seed in range(1 if options.quick else options.seeds):
        home = work / f"seed{seed}"
        files = draw(texts, home, seed, train, test)
        record = deltaloom.run(recipe(str(assets / MODEL), files, seed), out=home / "run")
        losses.append(measured(record, home / "run"))
    print(table(losses))
    results = [claim(losses, arm, quick=options.quick) for arm in CLAIMS]
    print(json.dumps({"bench": "merge_with_data", "results": results}))


def read(data: Path, domain: str) -> Iterator[str]:
    """Pieces of one domain's text."""
    if domain == "fables":
        for file in sorted((data / "fables_en").rglob("*.jsonl")):
            for line in file.read_text("utf-8").split("\n"):
                fable = json.loads(line).get("fable") if line.strip() else None
                if fable:
                    yield " ".join(str(fable).split())[:CHARACTERS]
    elif domain == "tales":
        for file in sorted((data / "snakes_stories").glob("*.md")):
            for tale in file.read_text("utf-8").split("<start>")[1:]:
                yield " ".join(tale.split())[:CHARACTERS]
    else:
        for file in sorted((data / "tinyshakespeare").rglob("*.txt")):
            text = file.read_text("utf-8")
            for start in range(0, len(text) - CHARACTERS, CHARACTERS):
                yield text[start : start + CHARACTERS].strip()


def draw(texts: dict, home: Path, seed: int, train: int, test: int) -> dict[str, tuple[str, str]]:
    """Files of training and test rows by domain; no text is in both."""
    home.mkdir(parents=True, exist_ok=True)
    dice, files = random.Random(seed), {}
    for name, found in texts.items():
        chosen = dice.sample(sorted(set(found)), train + test)
        paths = []
        for part, rows in (("train", chosen[:train]), ("test", chosen[train:])):
            path = home / f"{part}-{name}.jsonl"
            path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), "utf-8")
            paths.append(str(path))
        files[name] = (paths[0], paths[1])
    return files


def recipe(base: str, files: dict[str, tuple[str, str]], seed: int) -> dict:
    """Tune the specialists, merge them in every way, measure all on all."""
    trains = [files[name][0] for name in DOMAINS]
    steps: list[dict] = [
        {"tune": {**TUNE, "data": data, "name": name}}
        for name, data in zip(DOMAINS, trains, strict=True)
    ]
    for name, arm in ARMS.items():
        data = {} if arm["method"] == "average" else {"data": trains, "max_length": 192}
        steps.append({"merge": {**arm, **data, "deltas": [*DOMAINS], "name": name}})
    tests = [files[name][1] for name in DOMAINS]
    deltas = ["base", *DOMAINS, *ARMS]
    steps.append({"measure": {"method": "loss", "deltas": deltas, "tasks": tests, "name": "all"}})
    return {"base": base, "seed": seed, "steps": steps}


def measured(record: dict, out: Path) -> dict[str, dict[str, float]]:
    """Loss per token by what was measured and domain, and the CPU seconds of every merge."""
    found: dict[str, dict[str, float]] = {}
    for label in ("base", *DOMAINS, *ARMS):
        found[label] = {
            name: Estimate.from_json(
                (out / "all" / f"{label}--test-{name}" / "estimate.json").read_text()
            ).value
            for name in DOMAINS
        }
        found[label]["mean"] = sum(found[label].values()) / len(DOMAINS)
        if label in ARMS:
            found[label]["seconds"] = record["results"]["steps"][label]["cost"]["cpu_seconds"]
    return found


def over_seeds(values: list[float]) -> Estimate:
    """The mean of one value a seed."""
    return Estimate.from_items({f"seed {k}": v for k, v in enumerate(values)}, metric="loss")


def shown(values: list[float], sign: str = "") -> str:
    if len(values) == 1:
        return f"{values[0]:{sign}.4f}"
    one = over_seeds(values)
    return f"{one.value:{sign}.4f} [{one.low:{sign}.4f}, {one.high:{sign}.4f}]"


def table(losses: list[dict]) -> str:
    """Mean loss over seeds with its interval, and the difference from the average."""
    lines = [
        f"| model | {' | '.join(DOMAINS)} | mean of the three | minus the average's | CPU s |",
        "|---|---|---|---|---|---|---|",
    ]
    for label in ("base", *DOMAINS, *ARMS):
        cells = [shown([one[label][name] for one in losses]) for name in (*DOMAINS, "mean")]
        gap, seconds = "", ""
        if label in ARMS:
            own = [one[label]["seconds"] for one in losses]
            seconds = f"{sum(own) / len(own):.1f}"
        if label in ARMS and label != "average":
            gap = shown([one[label]["mean"] - one["average"]["mean"] for one in losses], "+")
        lines.append(f"| {label} | {' | '.join(cells)} | {gap} | {seconds} |")
    return "\n".join(lines) + "\n"


def claim(losses: list[dict], arm: str, *, quick: bool) -> dict:
    """The arm's loss is below the average's: the upper end of the interval of the difference."""
    gaps = [one[arm]["mean"] - one["average"]["mean"] for one in losses]
    high = gaps[0] if len(gaps) == 1 else over_seeds(gaps).high
    return {
        "name": f"{arm} minus average, mean loss of three domains",
        "value": high,
        "bound": None if quick else "< 0",
        "holds": quick or high < 0,
        "unit": f"nats per token, high end of the 95 % interval, {len(losses)} seeds",
    }


if __name__ == "__main__":
    main()
