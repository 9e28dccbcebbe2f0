"""LESS's scores from projected gradients, beside the exact ones from whole gradients.

    python bench/_gradient_fidelity.py ASSETS WORK [--quick]

A real small model is warmed up by the product's own warm-up run on ten sources of real text; then
600 pool rows are scored against six targets of eight rows, by LESS's formula at that checkpoint.
Prints one JSON object: for each projection its agreement with the exact scores, and the sizes of
the stores. `gradients.py` runs it and says what the figures mean.
"""

from __future__ import annotations

import argparse
import json
import random
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from _data import read_sources, write
from scipy.stats import spearmanr
from torch import Tensor

from deltaloom.core.base import Base
from deltaloom.core.encoding import Encoded
from deltaloom.core.examples import Examples
from deltaloom.core.features import Features
from deltaloom.core.run import Run
from deltaloom.engine.gradients import per_example
from deltaloom.engine.preconditioning import Adam
from deltaloom.engine.projection import Kind, Projection, projection
from deltaloom.engine.taps import Rows
from deltaloom.select._influence import Sketching
from deltaloom.select._warmup import load_epoch, warm_up
from deltaloom.tune.lora import Lora

MODEL = "models/TinyStories-656K"
GOALS = ("fables", "trec", "tales", "gsm8k", "natural_instructions", "sst2")
FULL = {"warmup": 2400, "pool": 600, "goal": 8, "seeds": {1024: 10, 4096: 4}}
SMALL = {"warmup": 80, "pool": 100, "goal": 8, "seeds": {1024: 1}}
KINDS: tuple[Kind, ...] = ("sparse", "rademacher", "kronecker")
TOP = 0.05
STORED = ("float32", "float16", "int8")
LESS_COPIES = 3
"""What LESS leaves on disk of every float16 row: blocks, all of them, all of them normalised."""


class Scores:
    """Pool and goal gradients of one model, and what projections make of their scores."""

    def __init__(self, model, pad_id: int, pool: list[Encoded], goals: list[Encoded], adam: Adam):
        self.shapes = {n: p.shape for n, p in model.named_parameters() if p.requires_grad}
        plain, goal = (gathered(model, rows, pad_id) for rows in (pool, goals))
        self.size = plain.shape[1]
        parts = plain.split([shape.numel() for shape in self.shapes.values()], dim=1)
        steps = [adam(n, g) for n, g in zip(self.shapes, parts, strict=True)]
        self.rows = {"steps": torch.cat(steps, dim=1), "plain": plain, "goal": goal}
        exact = {name: rows.numpy() for name, rows in self.rows.items()}
        self.exact = {what: self.scores(exact[what], exact["goal"]) for what in ("steps", "plain")}

    def project(self, sketch: Projection) -> dict[str, np.ndarray]:
        """Unit images of the pool's Adam steps and plain gradients, and of the goals', (n, dim)."""
        whole = torch.cat(list(self.rows.values()))
        out, at = torch.zeros(len(whole), sketch.dim), 0
        for name, shape in self.shapes.items():
            own = whole[:, at : at + shape.numel()].reshape(-1, *shape)
            sketch.add(name, Rows(lambda own=own: own), out, None)
            at += shape.numel()
        parts = out.split([len(rows) for rows in self.rows.values()])
        found = [torch.nn.functional.normalize(part, dim=1).numpy() for part in parts]
        return dict(zip(self.rows, found, strict=True))

    def scores(self, pool: np.ndarray, goals: np.ndarray) -> np.ndarray:
        """Rows (n, d), (6 x 8, d) -> each target's scores, (n, 6): mean cosine with its rows."""
        a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (pool, goals))
        return (a @ b.T).reshape(len(a), len(GOALS), -1).mean(2)

    def agreement(self, found: np.ndarray, what: str) -> tuple[float, float]:
        """Spearman's correlation with the exact scores, and overlap of the top; target means."""
        exact, count = self.exact[what], round(TOP * len(found))
        pairs = list(zip(found.T, exact.T, strict=True))
        ranks = [spearmanr(a, b).statistic for a, b in pairs]
        tops = [(np.argsort(-a)[:count], np.argsort(-b)[:count]) for a, b in pairs]
        shared = [len(np.intersect1d(a, b)) / count for a, b in tops]
        return float(np.mean(ranks)), float(np.mean(shared))


def gathered(model, rows: list[Encoded], pad_id: int) -> Tensor:
    """Whole gradients in the order of the rows, (n, D)."""
    out = None
    for numbers, found in per_example(model, rows, pad_id):
        if out is None:
            out = torch.empty(len(rows), found.shape[1])
        out[numbers] = found
    return out


def data(assets: Path, work: Path, size: dict) -> dict[str, Examples]:
    """Rows for the warm-up, the pool and the goals; no row is in two of them."""
    rng = random.Random(0)
    parts: dict[str, list] = {"warmup": [], "pool": [], "goal": []}
    sources = read_sources(assets)
    for name in sorted(sources, key=lambda n: GOALS.index(n) if n in GOALS else len(GOALS)):
        rows = rng.sample(sources[name], len(sources[name]))
        if name in GOALS:
            parts["goal"] += rows[: size["goal"]]
            rows = rows[size["goal"] :]
        for part in ("pool", "warmup"):
            share = size[part] // len(sources)
            parts[part] += rows[:share]
            rows = rows[share:]
    for part, rows in parts.items():
        write(work / f"{part}.jsonl", rows)
    return {part: Examples.read(work / f"{part}.jsonl") for part in parts}


def stores(work: Path, pool: np.ndarray, goals: np.ndarray, scores: Scores) -> dict[str, dict]:
    """Number format -> agreement of what is read back, and bytes against LESS's files."""
    out = {}
    for dtype in STORED:
        read, size = [], 0
        for part, rows in (("pool", pool), ("goal", goals)):
            ids = [str(i) for i in range(len(rows))]
            folder = work / f"{part}-{rows.shape[1]}-{dtype}"
            store = Features.create(folder, ids, rows.shape[1], about={}, dtype=dtype)
            for number, own in enumerate(store.shards()):
                store.write_shard(number, rows[own.start : own.stop])
            read.append(store.matrix())
            if part == "pool":
                size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
        rank, top = scores.agreement(scores.scores(*read), "steps")
        out[dtype] = {"rank": rank, "top": top, "share": size / (LESS_COPIES * 2 * pool.size)}
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("assets", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    size = SMALL if options.quick else FULL
    parts = data(options.assets, options.work, size)
    base = Base(model=str(options.assets / MODEL), device="cpu")
    lora = Lora(r=8, lr=3e-3, epochs=1, batch_size=8, max_length=192)
    how = Sketching(base, lora, "sparse", 4096, 0, "int8")
    with Run.open(options.work / "run", {}, {}) as run:
        epoch = warm_up(how, 1.0, parts["warmup"], run, options.work)[-1]
    model, adam = load_epoch(epoch, how)
    pad = base.tokenizer().pad_token_id
    pool, goals = how.encode(parts["pool"]), how.encode(parts["goal"])
    scores = Scores(model, pad, pool, goals, adam)
    found: dict[str, list] = {}
    stored: dict[str, dict] = {}
    for width, seeds in size["seeds"].items():
        for kind, seed in ((kind, seed) for seed in range(seeds) for kind in KINDS):
            images = scores.project(projection(kind, width, seed))
            for what in ("steps", "plain"):
                case = scores.agreement(scores.scores(images[what], images["goal"]), what)
                found.setdefault(f"{what} {width} {kind}", []).append(case)
            if kind == "sparse" and seed == 0:
                stored[str(width)] = stores(options.work, images["steps"], images["goal"], scores)
    print(
        json.dumps(
            {
                "rows": [len(pool), len(goals)],
                "size": scores.size,
                "warmup_steps": len(parts["warmup"]) // lora.batch_size,
                "cpu": time.process_time(),
                "found": found,
                "stored": stored,
            }
        )
    )


if __name__ == "__main__":
    main()
