"""Gradients and hidden states of a measured model, shard by shard, here or by workers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from deltaloom.core.encoding import Encoded
from deltaloom.core.features import Features
from deltaloom.core.spec import digest
from deltaloom.engine.embed import Pooling, Tokens, layer_embeddings, layer_widths
from deltaloom.engine.gradients import sketched
from deltaloom.engine.meter import forward_cost, training_cost
from deltaloom.engine.projection import Sparse
from deltaloom.engine.shards import Job, fill
from deltaloom.measure._differentiable import differentiable

if TYPE_CHECKING:
    from deltaloom.core.examples import Examples
    from deltaloom.core.origin import Origin
    from deltaloom.core.run import Run


@dataclass
class Pass(Job):
    """A row of numbers for each encoded row, from the model at hand or loaded from `origin`."""

    rows: list[Encoded]
    pad_id: int
    origin: Origin | None
    store: Features = field(init=False)
    model: Any = field(init=False, default=None)

    @abstractmethod
    def of(self, model: Any, rows: list[Encoded]) -> np.ndarray:
        """(m, d) float32 for some of the rows."""

    @abstractmethod
    def cost(self, model: Any, tokens: int) -> dict[str, float]:
        """What a pass over so many tokens enters in the ledger."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "model": None}  # too large to send

    def open(self) -> Callable[[int], dict[str, float]]:
        """See Job."""
        model = self.model
        if model is None:
            assert self.origin is not None
            model, _ = self.origin.load()
        shards = self.store.shards()

        def shard(number: int) -> dict[str, float]:
            part = [self.rows[i] for i in shards[number]]
            self.store.write_shard(number, self.of(model, part))
            return self.cost(model, sum(len(row.input_ids) for row in part))

        return shard

    def filled(
        self, model: Any, data: Examples, width: int, about: dict[str, Any], run: Run
    ) -> tuple[Features, dict[str, float]]:
        """A row of `width` for each row and what they cost, by `run`'s workers if they can load it.

        Shards stay in the run's scratch, so an interrupted measurement goes on where it was.
        """
        about = {**about, "data": data.digest(), "of": run.folder.name}
        folder = run.work / "rows" / digest(about)
        self.store = Features.create(folder, data.ids, width, about=about)
        workers = run.model_workers
        if workers.here:
            self.model = model
        found = fill(self.store, self, run, workers)
        return found, self.cost(model, sum(len(row.input_ids) for row in self.rows))


@dataclass
class Gradients(Pass):
    """Sparse projections of the gradients of the rows' losses."""

    parameters: str
    r: int
    dimension: int
    seed: int

    def of(self, model: Any, rows: list[Encoded]) -> np.ndarray:
        """See Pass."""
        found = np.zeros((len(rows), self.dimension), np.float32)
        sketch = Sparse(self.dimension, self.seed)
        with differentiable(model, self.parameters, self.r, self.seed) as ready:
            passes = sketched(ready.model, rows, self.pad_id, sketch, names=ready.names)
            for numbers, part in passes:
                found[numbers] = part.cpu().numpy()
        return found

    def cost(self, model: Any, tokens: int) -> dict[str, float]:
        """See Pass."""
        trainable: Literal["adapter", "all"] = "adapter" if self.parameters == "lora" else "all"
        return training_cost(model, tokens, trainable)

    def matrix_of(
        self, model: Any, data: Examples, run: Run
    ) -> tuple[np.ndarray, dict[str, float]]:
        """(n, dimension) float32 in memory, and what it cost."""
        about = {
            "what": "gradients",
            "parameters": [self.parameters, self.r],
            "projection": [self.dimension, self.seed],
        }
        store, cost = self.filled(model, data, self.dimension, about, run)
        return store.matrix(), cost


@dataclass
class LayerStates(Pass):
    """Pooled hidden states of every layer, side by side."""

    pooling: Pooling
    tokens: Tokens

    def of(self, model: Any, rows: list[Encoded]) -> np.ndarray:
        """See Pass."""
        return layer_embeddings(model.eval(), rows, self.pad_id, self.pooling, self.tokens)

    def cost(self, model: Any, tokens: int) -> dict[str, float]:
        """See Pass."""
        return forward_cost(model, tokens)

    def stored(
        self, model: Any, data: Examples, whose: str, run: Run
    ) -> tuple[Layers, dict[str, float]]:
        """The layers, and what they cost; `whose` tells the models of a comparison apart."""
        pooling = [self.pooling, self.tokens]
        about = {"what": "hidden states", "pooling": pooling, "whose": whose}
        widths = layer_widths(model)
        store, cost = self.filled(model, data, sum(widths), about, run)
        return Layers(store, widths), cost


@dataclass(frozen=True)
class Layers:
    """Pooled states on disk, read one layer at a time."""

    store: Features
    widths: list[int]

    def __len__(self) -> int:
        return len(self.widths)

    def __getitem__(self, layer: int) -> np.ndarray:
        """(n, h) float32 of one layer."""
        start = sum(self.widths[:layer])
        columns = slice(start, start + self.widths[layer])
        return np.concatenate([block[:, columns] for _, block in self.store.blocks()])
