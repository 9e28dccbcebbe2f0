"""Hidden states of rows, stored shard by shard: what rows are compared by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from deltaloom.core.features import Features
from deltaloom.core.packed import PackedRows, encode_packed
from deltaloom.engine.embed import Pooling, embeddings
from deltaloom.engine.forward import padding_token
from deltaloom.engine.meter import forward_cost
from deltaloom.engine.shards import Job, fill

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from deltaloom.core.base import Base
    from deltaloom.core.examples import Examples
    from deltaloom.core.run import Run


def embedded(
    name: str,
    data: Examples,
    base: Base,
    run: Run,
    pooling: Pooling = "mean",
    max_length: int | None = None,
) -> Features:
    """Pooled last hidden states (n, h) of the rows' tokens, prompt and response alike.

    Rows are cut to the base's context, or to `max_length`; the run's notes say how many. What is
    stored in the run's scratch is not made again.
    """
    limit = min(max_length or base.max_length, base.max_length)
    rows = encode_packed(data, base.tokenizer(), limit)
    run.note(**{f"{name}_rows_cut": rows.cut})
    about = {
        "what": f"{name} embeddings",
        "base": base.fingerprint(),
        "pooling": pooling,
        "max_length": limit,
        "data": data.digest(),
    }
    folder = run.work / "embeddings" / name
    store = Features.create(folder, data.ids, _width(base), about=about)
    return fill(store, _Embedding(base, rows, store, pooling), run)


def centred(groups: Mapping[str, Examples], base: Base, run: Run) -> dict[str, NDArray[np.float32]]:
    """Each group's mean hidden states, less the mean of the first group's.

    Hidden states of unlike rows share a large offset, which would make all cosines alike.
    """
    found = {name: embedded(name, rows, base, run).matrix() for name, rows in groups.items()}
    middle = next(iter(found.values())).mean(axis=0)
    return {name: rows - middle for name, rows in found.items()}


class _Embedding(Job):
    """Embeds the rows of one shard."""

    def __init__(self, base: Base, rows: PackedRows, store: Features, pooling: Pooling) -> None:
        self.base, self.rows, self.store = base, rows, store
        self.pooling: Pooling = pooling

    def open(self) -> Callable[[int], dict[str, float]]:
        """Load the model."""
        model, pad = self.base.load(), padding_token(self.base.tokenizer())
        shards = self.store.shards()

        def do(number: int) -> dict[str, float]:
            rows = [self.rows[i] for i in shards[number]]
            self.store.write_shard(number, embeddings(model, rows, pad, self.pooling))
            return forward_cost(model, sum(len(row.input_ids) for row in rows))

        return do


def _width(base: Base) -> int:
    config = base.config()
    text = config.get("text_config", config)
    # Some models (OPT) project the last states to the width of their word embeddings.
    return int(text.get("word_embed_proj_dim") or text.get("hidden_size") or text["n_embd"])
