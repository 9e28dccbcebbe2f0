"""Conditional tuning against plain tuning and a random indicator, on prompts against memory.

    python bench/claims/conditional.py [--quick] [--seeds N] [--workers N] [--device cuda|cpu]
        [--work DIR] [--done]

A small model is first made that does two things: it copies a note of four words from filler, and
it recalls four words that it knows of a key. In tuning rows both are there: a note, and a question
about a key. In 80 % of the rows they agree; in 6 % they contradict and the answer follows the
note, in 10 % it follows memory, and 4 % have no note. So a plain model cannot tell when to follow
the context, and does best to follow memory. Asked are contradicting prompts about keys that are in
no tuning row, through the chat template; an answer is right when it is the note, all four words.
`conditional` has the paper's threshold of 0.6, `top tenth` the one that a tenth of the turns are
above, `random indicator` as many turns as that, drawn. `told` puts the indicator on the rows that
truly need the context, which no method can know: what a perfect score would give. The seed draws
keys, rows and tuning; differences are taken within a seed, intervals are Student's t over seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from _seeds import over_seeds, shown

os.environ.setdefault("OMP_NUM_THREADS", "1")

import _conditional_base as small
import numpy as np
import torch
from _units import Units
from scipy.stats import mannwhitneyu

import deltaloom
from deltaloom.core.features import Features

INDICATOR = " [IND]"
"""A token of the model's vocabulary that is in no text."""
KINDS = {"agree": 0.80, "context": 0.06, "memory": 0.10, "no note": 0.04}
"""Shares of the training rows."""
ROWS, ASKED, FIRST = 3000, 100, 20
TUNE: dict[str, Any] = {"lr": 3e-3, "epochs": 3, "batch_size": 16, "r": 16, "alpha": 16.0,
                        "dropout": 0.05}  # fmt: skip
THRESHOLD, TOP = 0.6, 0.1
"""The paper's, and the share of turns above ours."""
ASK: dict[str, Any] = {"match": "contains", "chat": True, "max_new_tokens": 8}
MEASURED: dict[str, tuple[str, dict[str, Any]]] = {
    "base": ("base", {}),
    "plain": ("plain", {}),
    "plain, no template": ("plain", {"chat": False}),
    "plain, steered by 0.95": ("plain", {"alpha": 0.95}),
    "conditional": ("conditional", {"indicator": INDICATOR}),
    "conditional, no indicator in use": ("conditional", {}),
    "top tenth": ("top", {"indicator": INDICATOR}),
    "top tenth, no indicator in use": ("top", {}),
    "random indicator": ("random", {"indicator": INDICATOR}),
    "told": ("told", {"indicator": INDICATOR}),
}
"""Arm -> model and settings."""
CLAIMED = (
    ("conditional", "plain"),
    ("conditional", "random indicator"),
    ("top tenth", "plain"),
    ("top tenth", "random indicator"),
    ("told", "plain"),
    ("told", "random indicator"),
    ("plain, steered by 0.95", "plain"),
)


def main() -> None:
    """Parse, run what is missing, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one seed, few rows, no claim")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--done", action="store_true", help="tell what --work holds, run nothing")
    parser.add_argument("--work", type=Path, help="folder to keep and resume the units in")
    options = parser.parse_args()
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the trainer takes a GPU where it sees one
    torch.set_num_threads(1)
    home = (options.work or Path(tempfile.mkdtemp(prefix="deltaloom-conditional-"))).resolve()
    quick = options.quick
    base = home / ("base-quick" if quick else "base")
    if not base.exists() and not options.done:
        small.pretrain(base, quick)
    names = [f"seed; {FIRST + k}" for k in range(1 if quick else options.seeds)]
    units = Units(home / "units", dict.fromkeys(names, ()))
    if not options.done:
        units.run(partial(unit, home, base, options.device, quick), options.workers)
    found = [one for one in map(units.get, names) if one]
    print(tables(found))
    results = judged(found)
    if quick:  # one seed of small data shows that it runs, and nothing else
        results = [{**one, "bound": None, "holds": True} for one in results]
    print(json.dumps({"bench": "claims-conditional", "results": results}))


def unit(home: Path, base: Path, device: str, quick: bool, name: str) -> dict[str, Any]:
    """One seed."""
    seed = int(name.removeprefix("seed; "))
    return one_seed(home / f"seed{seed}", {"model": str(base), "device": device}, seed, quick)


def one_seed(
    home: Path, base: dict[str, str], seed: int, quick: bool
) -> dict[str, dict[str, float]]:
    """Tune and measure every arm; numbers by arm, and of the score under "score"."""
    home.mkdir(parents=True, exist_ok=True)
    rng = random.Random(f"conditional {seed}")
    keys = rng.sample(small.KEYS, len(small.KEYS))
    tuned, held = keys[: len(keys) // 2], keys[len(keys) // 2 :]
    rows = training(tuned, 48 if quick else ROWS, rng)
    (home / "told.jsonl").write_text("".join(json.dumps(told(row)) + "\n" for row in rows))
    (home / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = [question(held, k, rng) for k in range(12 if quick else ASKED)]
    (home / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))

    shared = {"base": base, "seed": seed, **TUNE}
    marked = {**shared, "data": home / "rows.jsonl", "indicator": INDICATOR,
              "scorer": str(home / "plain")}  # fmt: skip
    deltaloom.tune("lora", data=home / "rows.jsonl", out=home / "plain", **shared)
    deltaloom.tune("lora", data=home / "told.jsonl", out=home / "told", **shared)
    deltaloom.tune("conditional", out=home / "conditional", threshold=THRESHOLD, **marked)
    values = Features.open(home / "conditional" / "scores").matrix()[:, 0]
    top = float(np.quantile(values, 1 - TOP))
    deltaloom.tune("conditional", out=home / "top", threshold=top, **marked)
    deltaloom.tune("conditional", out=home / "random", assign="random", threshold=top, **marked)
    found: dict[str, dict[str, float]] = {"score": score(home, rows)}
    for number, (arm, (model, settings)) in enumerate(MEASURED.items()):
        out = home / f"measured{number}"
        deltas = ["base" if model == "base" else str(home / model)]
        values = {**ASK, **settings, "base": base, "deltas": deltas, "tasks": home / "asked.jsonl"}
        (one,) = deltaloom.measure("context", out=out, **values).values()
        read = json.loads(next(out.rglob("attention.json")).read_text())
        found[arm] = {
            "right": one.value,
            "share": read["share"]["value"],
            "dependency": read["dependency"]["value"],
        }
    return found


def training(keys: list[str], count: int, rng: random.Random) -> list[dict]:
    """Conversations in the shares of `KINDS`, in random order."""
    facts = small.known()
    kinds = [kind for kind, share in KINDS.items() for _ in range(round(share * count))]
    rng.shuffle(kinds)
    rows = []
    for number, kind in enumerate(kinds):
        key = rng.choice(keys)
        other = rng.sample(small.WORDS, small.LENGTH)
        note = {"agree": facts[key], "no note": None}.get(kind, other)
        answer = other if kind == "context" else facts[key]
        messages = [
            {"role": "user", "content": small.prompt(note, key, rng)},
            {"role": "assistant", "content": " ".join(answer)},
        ]
        rows.append({"id": f"r{number}", "source": kind, "messages": messages})
    return rows


def question(keys: list[str], number: int, rng: random.Random) -> dict:
    """A prompt whose note contradicts memory, and is the answer."""
    note = rng.sample(small.WORDS, small.LENGTH)
    text = small.prompt(note, rng.choice(keys), rng)
    return {"id": f"q{number}", "prompt": text, "answer": " ".join(note)}


def told(row: dict) -> dict:
    """The row with the indicator if it needs the context."""
    if row["source"] != "context":
        return row
    user, answer = row["messages"]
    return {**row, "messages": [{**user, "content": user["content"] + INDICATOR}, answer]}


def score(home: Path, rows: list[dict]) -> dict[str, float]:
    """How well the score finds the rows that need the context."""
    values = Features.open(home / "conditional" / "scores").matrix()[:, 0]
    needed = np.array([row["source"] == "context" for row in rows])
    wins = mannwhitneyu(values[needed], values[~needed]).statistic
    above = values > THRESHOLD
    return {
        "area under the curve": float(wins / (needed.sum() * (~needed).sum())),
        "share of rows above the threshold": float(above.mean()),
        "mean score": float(values.mean()),
        "share of the top tenth that needs the context": float(
            needed[values > np.quantile(values, 1 - TOP)].mean()
        ),
    }


def tables(found: list[dict[str, dict[str, float]]]) -> str:
    """Every arm, the score and the differences."""
    lines = ["| arm | right | attention to the user | score |", "|---|---|---|---|"]
    for arm in MEASURED:
        cells = [shown([seed[arm][key] for seed in found]) for key in found[0][arm]]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    lines += ["", "| the score on the training rows | value |", "|---|---|"]
    for key in found[0]["score"]:
        lines.append(f"| {key} | {shown([seed['score'][key] for seed in found])} |")
    lines += ["", "| difference | right |", "|---|---|"]
    for a, b in CLAIMED:
        both = [seed[a]["right"] - seed[b]["right"] for seed in found]
        lines.append(f"| {a} - {b} | {shown(both, '+')} |")
    return "\n".join(lines) + "\n"


def judged(found: list[dict[str, dict[str, float]]]) -> list[dict]:
    """Does the first of each pair answer more from the context than the second?"""
    results = []
    for a, b in CLAIMED:
        one = over_seeds([seed[a]["right"] - seed[b]["right"] for seed in found])
        low = one.value if len(found) == 1 else one.low  # of one seed there is no interval
        unit = f"accuracy, low end of the 95 % interval, {len(found)} seeds"
        results.append({"name": f"{a} - {b}", "value": round(low, 4), "bound": "> 0",
                        "holds": low > 0, "unit": unit})  # fmt: skip
    return results


if __name__ == "__main__":
    main()
