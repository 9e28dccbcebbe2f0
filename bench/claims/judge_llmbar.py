"""A judge tuned on part of LLMBar beside its base on the rest.

    DELTALOOM_ASSETS=DIR python bench/claims/judge_llmbar.py [--quick] [--seeds N] [--work DIR]

LLMBar's five sets (Natural, and Adversarial's four), the pairs whose prompts fit the context of a
story model of 487K parameters. Seven tenths are learned from, the others held out, the same for
every seed; pairs about one instruction stay together. The learning rate is the one that
`claims/sparse.py` chose for full tuning of a model of this family on other data: nothing was chosen
here. Learned from is what `select judgements` writes, both orders of a pair; measured is `measure
judge` by likelihood, the two orders averaged. The base is the same model untouched, asked the same
way.

**What is learned may be no more than length**: in the adversarial sets the shorter response is
mostly the right one, by how they were made. So three judges without a model stand beside (the
shorter, the longer, chance), and the tuned judge's accuracy where the longer response is right.
The interval is over new seeds and new pairs (both random).
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
from deltaloom.core.base import Base
from deltaloom.core.estimate import Estimate, compare_seeds, pool_seeds
from deltaloom.core.examples import Examples, parse
from deltaloom.measure._judge_prompts import request
from deltaloom.measure._judgements import judgements

MODEL = "models/storyfam-L"
SETS = ("Natural", *(f"Adversarial/{name}" for name in ("GPTInst", "GPTOut", "Manual", "Neighbor")))
TRAIN = 0.7
TUNING = {"lr": 3e-3, "epochs": 3, "batch_size": 16}

Row = dict[str, Any]


def main() -> None:
    """Parse, run what is missing, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one seed, few pairs, no claim")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--work", type=Path, help="folder to keep and resume the runs in")
    options = parser.parse_args()
    if not os.environ.get("DELTALOOM_ASSETS"):
        print("DELTALOOM_ASSETS is not set: this bench needs a real model and data")
        print(
            json.dumps(
                {"bench": "claims-judge_llmbar", "results": [], "skipped": "no DELTALOOM_ASSETS"}
            )
        )
        return
    torch.set_num_threads(1)
    assets = Path(os.environ["DELTALOOM_ASSETS"]).resolve()
    work = (
        options.work or Path(tempfile.mkdtemp(prefix="deltaloom-claims-judge_llmbar-"))
    ).resolve()
    bench = Bench(assets, work, options.quick)
    seeds = range(1 if options.quick else options.seeds)
    tuned = [bench.tuned(seed) for seed in seeds]
    print(json.dumps({"bench": "claims-judge_llmbar", "results": bench.judged(tuned)}))


class Bench:
    """The study's files and runs."""

    def __init__(self, assets: Path, work: Path, quick: bool) -> None:
        self.base, self.work, self.quick = assets / MODEL, work, quick
        work.mkdir(parents=True, exist_ok=True)
        base = Base(model=str(self.base), device="cpu")
        self.tokenizer, self.limit = base.tokenizer(), base.max_length
        rows = [row for name in SETS for row in pairs(assets, name)]
        self.rows = parts([row for row in rows if self.fits(row)], quick)
        counts = {part: len(found) for part, found in self.rows.items()}
        print(f"{sum(counts.values())} of {len(rows)} pairs fit the context: {counts}", flush=True)
        for part, found in self.rows.items():
            text = "".join(json.dumps(row) + "\n" for row in found)
            (work / f"{part}.jsonl").write_text(text, encoding="utf-8")

    def fits(self, row: Row) -> bool:
        """Whether the whole question and its verdict fit the base's context."""
        (one,) = judgements(Examples([parse("row", "row", dict(row))]), [], False, False)
        prompt = request(one) + "verdict: A"
        return len(self.tokenizer(prompt)["input_ids"]) < self.limit

    def tuned(self, seed: int) -> Estimate:
        """A judge tuned with this seed, measured on the held-out pairs."""
        home = self.work / f"seed-{seed}"
        deltaloom.select(
            "judgements", pool=self.work / "train.jsonl", out=home / "mixture", seed=seed
        )
        settings = {**TUNING, **({"epochs": 1} if self.quick else {})}
        deltaloom.tune(
            "full", base=self.base, data=home / "mixture", out=home / "judge", seed=seed, **settings
        )
        return self.measured(home / "judge", home / "test")

    def measured(self, judge: Path | None, out: Path) -> Estimate:
        """Agreement with people of a judge, or of the base."""
        deltas = {} if judge is None else {"deltas": [judge]}
        task = self.work / "test.jsonl"
        (found,) = deltaloom.measure(
            "judge", base=self.base, tasks=task, out=out, **deltas
        ).values()
        return found

    def judged(self, tuned: list[Estimate]) -> list[dict[str, Any]]:
        """The claim, and what to hold against it."""
        base = self.measured(None, self.work / "base")
        rows = {row["id"]: row for row in self.rows["test"]}
        longer = {key: len(row["output_1"]) > len(row["output_2"]) for key, row in rows.items()}
        cue = {key: float(longer[key] != (rows[key]["label"] == 1)) for key in rows}
        results = [
            told("accuracy of the base", base),
            told("accuracy of always taking the shorter response",
                 Estimate.from_items(cue, metric="judge_accuracy")),
        ]  # fmt: skip
        if len(tuned) < 2:
            return [*results, told("accuracy of the tuned judge", tuned[0])]
        gap = compare_seeds(tuned, [base] * len(tuned), items="random")
        print(f"tuned minus base: {gap.summary()}")
        results.append(told("accuracy of tuned judges", pool_seeds(tuned, items="random")))
        for name, keep in (("shorter", 1.0), ("longer", 0.0)):
            inside = [part_of(one, [key for key in rows if cue[key] == keep]) for one in tuned]
            title = f"accuracy of tuned judges where the {name} response is right"
            results.append(told(title, pool_seeds(inside, items="random")))
        natural = [key for key, row in rows.items() if row["source"] == "Natural"]
        inside = [part_of(one, natural) for one in tuned]
        results.append(
            told("accuracy of tuned judges on Natural", pool_seeds(inside, items="random"))
        )
        low = gap.difference.low
        results.append(
            {
                "name": "tuned judge minus base, accuracy, low end of the 95 % interval",
                "value": float(f"{low:.4g}"),
                "bound": "> 0",
                "holds": low > 0,
                "unit": f"share of {base.n} held-out pairs, {len(tuned)} seeds",
            }
        )
        return results


def pairs(assets: Path, name: str) -> list[Row]:
    """LLMBar's rows of one set, with an id and their set as source."""
    path = assets / "data/llmbar/LLMBar" / name / "dataset.json"
    rows = json.loads(path.read_text(encoding="utf-8"))
    source = name.rpartition("/")[2]
    return [{**row, "id": f"{source}-{k}", "source": source} for k, row in enumerate(rows)]


def parts(rows: list[Row], quick: bool) -> dict[str, list[Row]]:
    """Cut into two at random; pairs about one instruction stay together."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["input"], []).append(row)
    order = sorted(groups)
    random.Random(0).shuffle(order)
    border = round(TRAIN * len(order))
    sides = {"train": order[:border], "test": order[border:]}
    found = {part: [row for key in keys for row in groups[key]] for part, keys in sides.items()}
    return {part: some[:24] for part, some in found.items()} if quick else found


def part_of(estimate: Estimate, ids: list[str]) -> Estimate:
    """The estimate on some of its items."""
    items = {key: estimate.items[key] for key in ids}
    return Estimate.from_items(items, metric=estimate.metric, of=estimate.of)


def told(name: str, estimate: Estimate) -> dict[str, Any]:
    """One figure that claims nothing."""
    print(f"{name}: {estimate.summary()}")
    return {
        "name": name,
        "value": float(f"{estimate.value:.4g}"),
        "bound": None,
        "holds": True,
        "unit": f"share, [{estimate.low:.3f}, {estimate.high:.3f}], {estimate.n} pairs",
    }


if __name__ == "__main__":
    main()
