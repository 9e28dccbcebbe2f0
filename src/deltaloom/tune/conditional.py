"""Instruction tuning that keeps context awareness, by an indicator on turns that need the context.

Paper: Wang, Bai, Peng and Hsieh 2024, "On the Loss of Context Awareness in General Instruction
Fine-tuning" (arXiv 2411.02688), section 5; official code `YihanWang617/context_awareness`.

Score of the response Y_m to the user's turns X_1..X_m, in one middle layer of a seed model:
s(Y_m) = (1 / |Y_m|) sum_{y in Y_m} max_h sum_{x in X_1 u .. u X_m} Att_h(y, x). Where
s(Y_m) > threshold, the indicator is put after the user's turn m; then the rows are tuned on as
usual. **In use, put the same text after a prompt that must be answered from its context**: the
tuned model may well answer from memory without it.

Differs: the indicator is a text, by default " [IND]", where the paper adds a token to the
vocabulary: any tokenizer reads it, no embedding is added, and LoRA has none to train. A token that
the vocabulary has and the data lack (`<|reserved_special_token_0|>`) is the nearest to the paper.
The seed model is the base unless `scorer` names another; the paper's is one tuned on the same rows
without indicators. Tuning is LoRA by default, as the paper's of 7B; `tuned=full` is its 1.1B one.

Not covered: rows of plain `text`, which have no user (they are tuned on unmarked); an indicator in
the rows of `evaluate`, which are taken as they are.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, final

from pydantic import Field, model_validator

from deltaloom.core.delta import Delta
from deltaloom.core.errors import InputError
from deltaloom.core.method import Evaluation, Sizes, Work
from deltaloom.core.places import PLACE
from deltaloom.core.progress import progress, say
from deltaloom.core.turns import Marked, mark, with_indicator
from deltaloom.tune._gradient import GradientTuner
from deltaloom.tune.full import Full
from deltaloom.tune.lora import Lora

if TYPE_CHECKING:
    from deltaloom.core.base import Base
    from deltaloom.core.examples import Examples
    from deltaloom.core.features import Features
    from deltaloom.core.run import Run

LR = {"lora": 2e-4, "full": 2e-5}
"""The paper's, by what is tuned."""
SHARD = 256
"""Scores in a file, computed again when interrupted."""


@final
class Conditional(GradientTuner):
    """Tuning with an indicator; the result is an adapter or model folder with `scores` in it."""

    tuned: Literal["lora", "full"] = "lora"
    """What is tuned: LoRA factors, or every parameter."""
    threshold: Annotated[float, Field(ge=0, le=1)] = 0.6
    """Score above which a turn gets the indicator (the paper: 0.6; it tries 0.5 to 0.8). Scores
    differ between models and kinds of rows: look at the run's `scores`."""
    indicator: Annotated[str, Field(min_length=1)] = " [IND]"
    """Text put after the user's turn (the paper: a new token [IND])."""
    assign: Literal["score", "random"] = "score"
    """Which turns get it: those above the threshold, or as many drawn at random, for a control."""
    layer: Annotated[int, Field(ge=0)] | None = None
    """Block of the seed model whose attention is read, from 0. None takes 15 of 22, the paper's
    for TinyLlama, in proportion."""
    scorer: Annotated[str | None, PLACE] = None
    """Seed model: an adapter, delta or model folder of the same base; None is the base itself."""
    lr: Annotated[float, Field(gt=0)] | None = None
    """Peak learning rate. None takes the paper's 2e-4 for LoRA and 2e-5 for full."""
    r: Annotated[int, Field(ge=1)] = 16
    """LoRA's rank (the paper: 16)."""
    alpha: Annotated[float, Field(gt=0)] = 16.0
    """LoRA's scaling is alpha / r (the paper: 16)."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """LoRA's dropout (the paper: 0.05)."""
    modules: list[str] | None = None
    """Names of the modules that LoRA adapts, by their last part; None adapts every linear module
    but the output head (the paper: all)."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if not self.indicator.strip():
            raise ValueError("indicator is blank, and chat templates strip blanks; give it letters")
        if self.modules is not None and self.tuned == "full":
            raise ValueError("'modules' narrows LoRA; leave it out with tuned = full")
        return self

    def work(self, sizes: Sizes) -> Work:
        """The inner tuning's, and one forward pass of the seed model."""
        inner = self._inner().work(sizes)
        return Work(
            forward_tokens=inner.forward_tokens + sizes.rows * sizes.row_tokens,
            adapter_tokens=inner.adapter_tokens,
            full_tokens=inner.full_tokens,
            memory_bytes=inner.memory_bytes,
            disk_bytes=inner.disk_bytes,
        )

    def tune(
        self, base: Base, data: Examples, run: Run, *, evaluation: Evaluation | None = None
    ) -> Delta:
        """Score, mark and tune; the scores are left in `run.folder / "scores"`.

        A score's id is its row's, followed by `:` and the response's number from 0 where rows have
        several; columns are `example` and `asked`, the message that was answered.

        Raises InputError for data without any user's turn, a `layer` the model does not have, and
        as the inner tuning does.
        """
        from deltaloom.engine.forward import padding_token

        tokenizer = base.tokenizer()
        limit = min(self.max_length or base.max_length, base.max_length)
        marked = mark(data, tokenizer, limit)
        scores = self._scores(base, data, marked, padding_token(tokenizer), run)
        turns = list(zip(scores.index["example"], scores.index["asked"], strict=True))
        values = scores.index["score"]
        above = [k for k, value in enumerate(values) if value > self.threshold]
        chosen = above
        if self.assign == "random":
            draw = random.Random(f"indicator {run.seed}")
            chosen = sorted(draw.sample(range(len(turns)), len(above)))
        if not 0 < len(above) < len(turns):
            say(
                f"{len(above)} of {len(turns)} turns score above {self.threshold}, from "
                f"{min(values):.2f} to {max(values):.2f}: the indicator tells nothing apart"
            )
        run.note(
            turns=len(turns),
            indicated_turns=len(chosen),
            indicator=self.indicator,
            indicator_tokens=tokenizer(self.indicator, add_special_tokens=False)["input_ids"],
        )
        asked: dict[str, set[int]] = {}
        for k in chosen:
            asked.setdefault(turns[k][0], set()).add(turns[k][1])
        rows = type(data)(
            (with_indicator(one, asked.get(one.id, ()), self.indicator) for one in data), data.name
        )
        return self._inner().tune(base, rows, run, evaluation=evaluation)

    def _inner(self) -> Lora | Full:
        shared: dict[str, Any] = {name: getattr(self, name) for name in GradientTuner.model_fields}
        shared["lr"] = self.lr or LR[self.tuned]
        if self.tuned == "full":
            return Full(**shared)
        own = {name: getattr(self, name) for name in ("r", "alpha", "dropout", "modules")}
        return Lora(**shared, **own)

    def _scores(
        self, base: Base, data: Examples, marked: list[Marked], pad_id: int, run: Run
    ) -> Features:
        """Every turn's score; an interrupted run keeps the shards that are there."""
        from deltaloom.core.features import Features
        from deltaloom.core.origin import Origin

        places = [
            (i, k) for i, one in enumerate(marked)
            for k, turn in enumerate(one.turns) if turn.asked is not None
        ]  # fmt: skip
        if not places:
            raise InputError(f"{data.name}: no row has a user's turn with a response to it")
        layer = self._layer(base)
        rows = [marked[i].row.id for i, _ in places]
        turns = Counter(rows)
        named = zip(rows, places, strict=True)
        ids = [f"{row}:{k}" if turns[row] > 1 else row for row, (_, k) in named]
        columns = {"example": rows, "asked": [marked[i].turns[k].asked for i, k in places]}
        about = {
            "method": "conditional",
            "base": base.fingerprint(),
            "scorer": self.scorer,
            "layer": layer,
            "max_length": self.max_length,
            "data": data.digest(),
        }
        store = Features.create(run.work / "scores", ids, 1, about=about, shard_rows=SHARD)
        missing = store.missing()
        if missing:
            model, _ = Origin(base, self.scorer).load()
            with progress("score", len(places)) as advance:
                for number in missing:
                    part = [places[p] for p in store.shards()[number]]
                    found = _dependencies(model, marked, part, layer, pad_id, run)
                    store.write_shard(number, found)
                    advance(len(part))
        return Features.from_scores(
            run.folder / "scores", ids, store.matrix(), about=about, columns=columns
        )

    def _layer(self, base: Base) -> int:
        from transformers import AutoConfig

        from deltaloom.engine.attention import middle_layer

        config = AutoConfig.from_pretrained(
            base.folder, trust_remote_code=base.trust_remote_code
        ).get_text_config()
        depth = config.num_hidden_layers
        if self.layer is None:
            return middle_layer(depth)
        if self.layer >= depth:
            raise InputError(f"layer = {self.layer}: {base.model} has blocks 0 to {depth - 1}")
        return self.layer


def _dependencies(
    model: Any,
    marked: list[Marked],
    places: list[tuple[int, int]],
    layer: int,
    pad_id: int,
    run: Run,
) -> list[list[float]]:
    """Scores (n, 1) of the turns at `places`, (row, turn) in the order of rows."""
    from deltaloom.engine.attention import Watched, user_shares
    from deltaloom.engine.meter import count_forward

    groups: dict[int, list[list[int]]] = {}
    for i, k in places:
        groups.setdefault(i, []).append(marked[i].turns[k].tokens)
    rows = [Watched(marked[i].row.input_ids, marked[i].user, own) for i, own in groups.items()]
    found = user_shares(model, rows, pad_id, [layer])
    count_forward(run, model, sum(len(row.ids) for row in rows))
    return [[float(one.dependency[0])] for shares in found for one in shares]
