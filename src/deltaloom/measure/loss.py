"""Cross-entropy of the responses in nats, per token or per example.

Paper: none; the training loss itself, on the same tokens (`core.encoding`), as an Estimate.
Per token it is what `transformers.Trainer` reports as `eval_loss`, were the whole set one batch.

Formula: with T_i scored tokens in row i, `l_i = -(1/T_i) sum_t log p(y_it | before)`. `token`:
`sum_i T_i l_i / sum_i T_i`, a ratio estimator (its error is the ratio's); `example`: the mean of
the `l_i`. Perplexity is `exp(value)`. Rows come in clusters when all have a `cluster` (at least
two clusters, fewer than rows).

Differs: lm-eval's rolling log-likelihood puts EOS before a text and splits long ones; here the
first token of a text without BOS is not scored, as in training, and long rows are shortened as
in training. `unscored_first_tokens` and `truncated_rows` of the run's notes count both.

Not covered: bits per byte (losses per token of models with different tokenizers do not compare);
row weights, which belong to training.
"""

from __future__ import annotations

import math
from typing import Any, Literal, final

from pydantic import Field

from deltaloom.core.encoding import encode
from deltaloom.core.errors import InputError
from deltaloom.core.estimate import Estimate
from deltaloom.core.examples import Examples
from deltaloom.core.method import Measurer, Sizes, Work
from deltaloom.core.run import Run
from deltaloom.measure._items import (
    clusters_of,
    length_limit,
    note,
    require_finite,
    require_rows,
    scored,
)


@final
class Loss(Measurer):
    """Mean cross-entropy of the response tokens."""

    by_token = True

    per: Literal["token", "example"] = "token"
    """What counts once: each token (long responses weigh more) or each example. Token is the
    convention of perplexity."""
    max_length: int | None = Field(default=None, ge=2)
    """Tokens per row at most; the prompt is cut first. None (ours) is the model's context."""

    def work(self, sizes: Sizes) -> Work:
        """One forward pass over every row; activations are not counted."""
        width = min(sizes.row_tokens, self.max_length or sizes.row_tokens)
        return Work(forward_tokens=sizes.rows * width, memory_bytes=sizes.weight_bytes)

    def measure(self, model: Any, tokenizer: Any, data: Examples, run: Run) -> Estimate:
        """Score the responses of `data`; items are the rows' mean losses in nats per token.

        Raises InputError for no rows or rows without a response, and WorkError naming the row
        for a loss that is not finite.
        """
        from deltaloom.engine.forward import unscored

        require_rows(data, "loss")
        rows = encode(data, tokenizer, length_limit(self.max_length, model))
        sequences = [(row.input_ids, row.response_mask) for row in rows]
        values, cost = scored("loss", model, tokenizer, sequences, run)
        losses: dict[str, float] = {}
        tokens: dict[str, float] = {}
        for example, found in zip(data, values, strict=True):
            require_finite(found, example)
            if len(found):
                losses[example.id] = -math.fsum(found) / len(found)
                tokens[example.id] = float(len(found))
        if not losses:
            raise InputError(
                f"measure loss: no row of {data.name} has a scored token with one before it"
            )
        note(
            run,
            unscored_first_tokens=unscored(sequences),
            truncated_rows=sum(row.truncated for row in rows),
        )
        clusters = clusters_of(data)
        return Estimate.from_items(
            losses,
            metric=f"loss_per_{self.per}",
            better="lower",
            clusters={key: clusters[key] for key in losses} if clusters else None,
            weights=tokens if self.per == "token" else None,
            missing=len(data) - len(losses),
            cost=cost,
        )
