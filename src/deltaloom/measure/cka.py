"""How alike two models represent the same rows, layer by layer, and how their changes agree.

Paper: Pari, Jelassi, Agrawal 2024, "Collective Model Intelligence Requires Compatible
Specialization" (arXiv 2411.02207); linear CKA of Kornblith et al. 2019 (arXiv 1905.00414), with the
unbiased HSIC of Song et al. 2012 as in Nguyen et al. 2021 (arXiv 2010.15327).

Formula, per layer (before the first block, after each block, after the final norm): CKA = HSIC(K,
L) / sqrt(HSIC(K, K) HSIC(L, L)), K and L the inner products of the rows' pooled hidden states in
the two models. The value is the mean over the blocks: the embeddings rarely differ and the norm
repeats the last block. `cka.json` has every layer with its interval and, where both models are
changes of one base, per block the cosine of the two changes, the share of the elements changed by
both that move in opposite directions, and the length of each change over that of the weights.

Items are jackknife pseudo-values, n C - (n - 1) C without the row: their mean is the estimate with
its bias removed to first order, and they pair with those of another model on the same rows.

Differs: the paper takes the biased HSIC of one layer on one batch; with fewer rows than a layer is
wide that calls any two models alike. Rows are pooled as the paper does, by their mean. Pooled
states go to disk once and are read a layer at a time, so memory is 2 n h float32 and 4 n^2 float64
numbers whatever the depth. Models of different depth are compared at the same relative depth.

Not covered: a layer of one model against all of the other; kernels that are not linear; rows that
only one of two tokenizers can say.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, final

from pydantic import Field

from deltaloom.core.atomic import write_json
from deltaloom.core.encoding import encode
from deltaloom.core.errors import InputError
from deltaloom.core.estimate import Estimate
from deltaloom.core.examples import Examples
from deltaloom.core.method import Measurer, Sizes, Work
from deltaloom.core.places import PLACE
from deltaloom.core.run import Run
from deltaloom.measure._items import clusters_of, length_limit, note, require_rows

if TYPE_CHECKING:
    import numpy as np

    from deltaloom.core.origin import Origin
    from deltaloom.measure._sketches import Layers


@final
class Cka(Measurer):
    """Representational compatibility with another model."""

    other: Annotated[str | None, PLACE] = None
    """What to compare with: a model, or a delta of the same base (folder or hub id); None is the
    base itself, so that the value says how far the measured model went from it."""
    pooling: Literal["mean", "weighted", "last"] = "mean"
    """How a row's hidden states become one vector (the paper's: mean)."""
    tokens: Literal["all", "response"] = "all"
    """Which tokens are pooled (the paper's: all)."""
    max_length: int | None = Field(default=None, ge=2)
    """Tokens per row at most; the prompt is cut first. None (ours) is the model's context."""

    def work(self, sizes: Sizes) -> Work:
        """A forward pass over every row through each of two models."""
        width = min(sizes.row_tokens, self.max_length or sizes.row_tokens)
        return Work(
            forward_tokens=2 * sizes.rows * width,
            memory_bytes=2.0 * sizes.weight_bytes + 32.0 * sizes.rows**2,
        )

    def measure(self, model: Any, tokenizer: Any, data: Examples, run: Run) -> Estimate:
        """Compare both models on the rows of `data`; items are pseudo-values by row.

        Raises InputError for fewer than five rows, an `other` that is no model or delta, rows
        that are all the same to a block, and rows without a response where `tokens` says so.
        """
        require_rows(data, "cka")
        if len(data) < 5:
            raise InputError(f"measure cka: {data.name} holds {len(data)} row(s) and needs 5")
        theirs = self._other(model, run.origin)
        mine, cost = self._states(model, tokenizer, data, "measured", run.origin, run)
        found, spent = self._states(*theirs.load(), data, _name(theirs), theirs, run)
        value, rows, items = _by_layer(mine, found, data)
        weights, why = _weights(run.origin, theirs)
        write_json(
            run.folder / "cka.json",
            {"value": value, "layers": rows, "weights": weights, "no_weights": why},
        )
        facts: dict[str, Any] = {"cka": value}
        note(run, **facts)
        return Estimate.from_items(
            dict(zip(data.ids, items.tolist(), strict=True)),
            metric="cka",
            clusters=clusters_of(data),
            cost={key: cost[key] + spent[key] for key in cost},
        )

    def _other(self, model: Any, origin: Origin | None) -> Origin:
        from deltaloom.core.base import Base
        from deltaloom.core.delta import adapter_kind
        from deltaloom.core.origin import Origin
        from deltaloom.engine.forward import device_of

        device = str(device_of(model))
        if self.other is not None:
            base = Base(model=self.other, device=device)
            # Some adapters lie beside a copy of their base's config.
            if adapter_kind(base.folder) is None and (base.folder / "config.json").exists():
                return Origin(base)
        if origin is None:
            raise InputError(
                f"measure cka: other = {self.other} is no whole model, and the base of the "
                "measured one is not known here; measure it by a step, or name a model"
            )
        return Origin(origin.base.model_copy(update={"device": device}), self.other)

    def _states(
        self, model: Any, tokenizer: Any, data: Examples, whose: str, origin: Any, run: Run
    ) -> tuple[Layers, dict[str, float]]:
        from deltaloom.engine.forward import padding_token
        from deltaloom.measure._sketches import LayerStates

        rows = encode(data, tokenizer, length_limit(self.max_length, model))
        for row, example in zip(rows, data, strict=True):
            if self.tokens == "response" and not any(row.response_mask):
                raise InputError(f"{example.where}: row {row.id!r} has no response to pool")
        work = LayerStates(rows, padding_token(tokenizer), origin, self.pooling, self.tokens)
        return work.stored(model, data, whose, run)


def _name(origin: Origin) -> str:
    from deltaloom.core.base import Base

    return (Base(model=origin.delta) if origin.delta else origin.base).fingerprint()


def _by_layer(
    mine: Layers, theirs: Layers, data: Examples
) -> tuple[float, list[dict[str, Any]], np.ndarray]:
    """CKA over the blocks, a record of every layer, and the (n,) pseudo-values of the former."""
    import numpy as np

    from deltaloom.measure._cka import cka_jackknife

    blocks, others = len(mine) - 2, len(theirs) - 2
    pairs = [(i, round(i * others / blocks)) for i in range(blocks + 1)]
    pairs.append((blocks + 1, others + 1))
    records, values, items = [], [], []
    for layer, other in pairs:
        name = {0: "embeddings", blocks + 1: "norm"}.get(layer, f"block {layer - 1}")
        value, own = cka_jackknife(mine[layer], theirs[other])
        known = not np.isnan(own).any()
        if name.startswith("block"):
            if not known:
                raise InputError(
                    f"measure cka: {name}: the hidden states of all rows of {data.name} are the "
                    "same in one of the models; give other rows"
                )
            values.append(value)
            items.append(own)
        interval = (None, None)
        if known:
            estimate = Estimate.from_items(
                dict(zip(data.ids, own.tolist(), strict=True)),
                metric="cka",
                clusters=clusters_of(data),
            )
            interval = (estimate.low, estimate.high)
        # The last token of all rows may be one and the same, and so its embedding.
        records.append({"layer": name, "cka": value if known else None,
                        "low": interval[0], "high": interval[1]})  # fmt: skip
    return float(np.mean(values)), records, np.mean(items, axis=0)


def _weights(mine: Origin | None, theirs: Origin) -> tuple[dict[str, Any] | None, str | None]:
    """How the two changes agree, or why that cannot be said."""
    from deltaloom.core.delta import load
    from deltaloom.measure._changes import compared

    if mine is None or mine.delta is None:
        return None, "the measured model is a base, not a change of one"
    name = theirs.delta or theirs.base.model
    try:
        changes = load(mine.delta, mine.base), load(name, mine.base)
        return compared(*changes, mine.base), None
    except InputError as error:
        return None, str(error)
