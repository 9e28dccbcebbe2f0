"""The gradient pass behind LESS: unit sketches of rows at one checkpoint, or only their influence.

Pool rows are Adam's steps, target rows plain gradients; both are projected and made unit vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from deltaloom.core.features import Features, require_same_space
from deltaloom.core.packed import PackedRows, encode_packed
from deltaloom.engine.forward import padding_token
from deltaloom.engine.gradients import sketched
from deltaloom.engine.meter import training_cost
from deltaloom.engine.projection import Kind, projection
from deltaloom.engine.shards import Job, fill
from deltaloom.select._warmup import Epoch, load_epoch

if TYPE_CHECKING:
    from deltaloom.core.base import Base
    from deltaloom.core.examples import Example, Examples
    from deltaloom.core.run import Run
    from deltaloom.tune.lora import Lora


@dataclass(frozen=True)
class Sketching:
    """What makes two gradient passes comparable."""

    base: Base
    warmup: Lora
    projection: Kind
    dimension: int
    seed: int
    dtype: str
    """How rows are stored."""

    def encode(self, data: Iterable[Example]) -> PackedRows:
        """Rows as the base sees them, cut to the warm-up's length."""
        longest = min(self.warmup.max_length or self.base.max_length, self.base.max_length)
        return encode_packed(data, self.base.tokenizer(), longest)


@dataclass
class Pass(Job):
    """Sketches of `rows` at one checkpoint into `store`; with a goal, their inner products only."""

    sketching: Sketching
    epoch: Epoch
    store: Features
    rows: PackedRows
    adam: bool
    goal: np.ndarray | None = field(default=None, repr=False)
    """(t, dim) unit rows."""

    def open(self) -> Callable[[int], dict[str, float]]:
        """Load the base with the checkpoint's adapter; a shard gives back what it cost."""
        how = self.sketching
        model, moments = load_epoch(self.epoch, how)
        sketch = projection(how.projection, how.dimension, how.seed)
        pad = padding_token(how.base.tokenizer())
        options: dict[str, Any] = {
            "precondition": moments if self.adam else None,
            "checkpointing": how.warmup.gradient_checkpointing,
        }

        def shard(number: int) -> dict[str, float]:
            part = [self.rows[i] for i in self.store.shards()[number]]
            out = np.zeros((len(part), how.dimension), np.float32)
            for numbers, found in sketched(model, part, pad, sketch, **options):
                out[numbers] = torch.nn.functional.normalize(found, dim=1).cpu().numpy()
            self.store.write_shard(number, out if self.goal is None else out @ self.goal.T)
            return training_cost(model, sum(len(row.input_ids) for row in part), "adapter")

        return shard


def gradient_pass(
    sketching: Sketching,
    epoch: Epoch,
    name: str,
    data: Examples,
    run: Run,
    home: Path,
    goal: tuple[Examples, np.ndarray] | None = None,
) -> Features:
    """Features of `data` (named `pool` or `target`) at a checkpoint, under `home`.

    With a `goal`, the target and its unit rows, only the influences (n, t) are kept.
    """
    about: dict[str, Any] = {
        "what": f"{name} gradients",
        "base": sketching.base.fingerprint(),
        "checkpoint": epoch.folder.name,
        "projection": [sketching.projection, sketching.dimension, sketching.seed],
        "data": data.digest(),
    }
    width, dtype, end = sketching.dimension, sketching.dtype, ""
    if goal is not None:
        about |= {"what": f"{name} influence", "target": goal[0].digest()}
        width, dtype, end = len(goal[0]), "float32", f"-{goal[0].digest()[:12]}"
    path = home / "features" / epoch.folder.name / f"{name}-{data.digest()[:12]}{end}"
    store = Features.create(path, data.ids, width, about=about, dtype=dtype)
    rows = sketching.encode(data if store.missing() else ())
    matrix = None if goal is None else goal[1]
    return fill(store, Pass(sketching, epoch, store, rows, name == "pool", matrix), run)


@dataclass(frozen=True)
class Part:
    """One checkpoint's share of the influence."""

    weight: float
    """The shares of all checkpoints sum to 1."""
    store: Features
    """The pool's features, or its influences."""
    goal: np.ndarray | None
    """(t, dim) unit rows of the target; None where the store holds influences."""


@dataclass(frozen=True)
class Influence:
    """The pool's influence on the target, (n, t), read from the stores as it is asked for."""

    parts: list[Part]
    targets: int

    @classmethod
    def measure(
        cls,
        sketching: Sketching,
        epochs: list[Epoch],
        pool: Examples,
        target: Examples,
        run: Run,
        home: Path,
        *,
        scores_only: bool,
    ) -> Influence:
        """Do the gradient passes that are missing under `home`."""
        total = sum(epoch.lr for epoch in epochs)
        parts = []
        for epoch in epochs:
            queries = gradient_pass(sketching, epoch, "target", target, run, home)
            goal = queries.matrix()  # (t, dim)
            kept = (target, goal) if scores_only else None
            store = gradient_pass(sketching, epoch, "pool", pool, run, home, kept)
            if not scores_only:
                require_same_space(store, queries)
            parts.append(Part(epoch.lr / total, store, None if scores_only else goal))
        return cls(parts, len(target))

    def of(self, columns: list[list[int]]) -> np.ndarray:
        """(n, c): for each set of target rows, the mean influence on them."""
        mean = np.zeros((self.targets, len(columns)), np.float32)
        for k, own in enumerate(columns):
            mean[own, k] = 1 / len(own)
        out = np.zeros((len(self.parts[0].store), len(columns)), np.float32)
        for part in self.parts:
            # The mean of the target's rows first: c columns instead of t.
            towards = part.weight * (mean if part.goal is None else part.goal.T @ mean)
            out += part.store.scores(towards.T)
        return out

    def rows(self, numbers: list[int]) -> np.ndarray:
        """(k, t): influence of these pool rows on every target row."""
        at = np.array(numbers, int)
        out = np.zeros((len(at), self.targets), np.float32)
        for part in self.parts:
            for rows, block in part.store.blocks():
                here = np.flatnonzero((at >= rows.start) & (at < rows.stop))
                own = block[at[here] - rows.start]
                out[here] += part.weight * (own if part.goal is None else own @ part.goal.T)
        return out
