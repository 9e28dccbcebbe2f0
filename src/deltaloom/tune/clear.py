"""Tune adapters on data with wrong labels: rows that look mislabelled bypass the adapters (CleaR).

Paper: Kim, Kim & Lee 2024, "CleaR: Towards Robust and Generalized Parameter-Efficient Fine-Tuning
for Noisy Label Learning" (arXiv 2411.00873), after the authors' code.

After `warm_up` epochs every epoch begins with `passes` forward passes over the data, with gates
Bernoulli(cap). Their mean logits z_n (the ensemble's prediction) give losses l_n, smoothed as
`l_n <- loss_momentum * l_n(before) + (1 - loss_momentum) * l_n`; two Gaussians fitted to all l_n
give p_n, the probability of the one with the lower mean. In training, layer l of example n uses its
adapters where g_nl ~ Bernoulli(cap * p_n) is 1, drawn anew every epoch (Bernoulli(cap) in the
warm-up), and the loss is
`CE(labels) + consistency * mean_n CE(softmax(z_n / temperature), softmax(now / temperature))`.

Differs: the smoothing of losses, in the authors' code for bottleneck adapters alone, is here for
all kinds; dropout stays on after the warm-up, where their code turns it off by oversight; nothing
is routed when the tuned model is used, so that it is an ordinary adapter that answers the same
every time, where their tests draw gates. For causal models l_n is the mean over the response's
tokens, the consistency is at each of them, and its targets tell `outcomes` tokens apart.

Not covered: BitFit; prefixes on sequence classifiers, which PEFT does not run with today's
transformers; several GPUs in one process.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, final

from pydantic import Field, model_validator

from deltaloom.core.delta import Delta, load
from deltaloom.core.errors import InputError
from deltaloom.core.features import Features
from deltaloom.core.method import Evaluation, Sizes, Work
from deltaloom.tune._gradient import Count, GradientTuner, Positive, train
from deltaloom.tune.lora import Lora, save_adapter

if TYPE_CHECKING:
    from deltaloom.core.base import Base
    from deltaloom.core.examples import Examples
    from deltaloom.core.run import Run
    from deltaloom.tune._routing import CleanRouting

SIZES = {"lora": 8, "bottleneck": 16, "prefix": 10}
DELTAS = {"lora": "lowrank", "bottleneck": "bottleneck", "prefix": "prompt"}
SCORES, SUSPICIOUS = "scores", "suspicious.jsonl"
Share = Annotated[float, Field(gt=0, le=1)]


@final
class Clear(GradientTuner):
    """CleaR; the result is a PEFT adapter folder with every row's probability of a right label."""

    classifiers = True

    adapter: Literal["lora", "bottleneck", "prefix"] = "lora"
    """Kind of the modules; all three are the paper's."""
    rule: Literal["bypass", "drop"] = "bypass"
    """bypass is CleaR. drop judges the rows in the same way and leaves those with p_n <= 1/2 out of
    the loss, without gates and consistency: the simpler rival, which was ahead where we measured
    both (bench/claims/clear.py)."""
    size: Count | None = None
    """Rank of LoRA, width of the bottleneck, or tokens of the prefix. None is 8 as in `tune lora`,
    or the authors' 16 and 10."""
    alpha: Positive = 16.0
    """LoRA's scaling is alpha / rank (as in `tune lora`)."""
    modules: list[str] | None = None
    """Names of the modules to adapt, by their last parts. None: every linear module for LoRA, the
    last products of attention and feed-forward for bottlenecks."""
    lr: Positive = 2e-4
    """Peak learning rate (as in `tune lora`; the authors give none)."""
    epochs: Positive = 8.0
    """Passes over the data, the warm-up's among them (the authors' script: 8)."""
    warm_up: Count = 3
    """Epochs before rows are judged (the authors' code: 3)."""
    cap: Share = 0.85
    """Largest chance that a layer's modules are used (the authors' code: 0.85 for LoRA and
    prefixes, 0.7 for bottlenecks)."""
    passes: Count = 1
    """Forward passes whose mean logits judge the rows (the authors' code: 2 for LoRA, else 1)."""
    loss_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Share of the losses before in the smoothed ones (the authors' code: 0.9 for bottlenecks, 0
    for the others)."""
    consistency: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the consistency loss (the authors' code: 1)."""
    temperature: Positive = 1.0
    """Temperature of both sides of the consistency loss (the authors' code: 1, and 0.5 for
    bottlenecks)."""
    outcomes: Count = 32
    """Tokens that the consistency targets of causal models tell apart; all others count as one
    (ours, to keep them small). Targets of classifiers are whole."""

    @model_validator(mode="after")
    def _something_after_the_warm_up(self) -> Clear:
        if self.warm_up >= self.epochs:
            raise ValueError(
                f"warm_up = {self.warm_up} leaves nothing of epochs = {self.epochs:g}; "
                "rows are judged after the warm-up"
            )
        return self

    def work(self, sizes: Sizes) -> Work:
        """Training of adapters and the passes that judge; activations are not counted."""
        weights = 4.0 * (self.size or SIZES[self.adapter]) * sizes.linear_sides
        tokens = sizes.rows * sizes.row_tokens
        looks = self.passes * (math.ceil(self.epochs) - self.warm_up)
        return Work(
            forward_tokens=looks * tokens,
            adapter_tokens=self.epochs * tokens,
            memory_bytes=sizes.weight_bytes + 4 * weights,
            disk_bytes=7 * weights + 8.0 * looks * sizes.rows * self.outcomes,
        )

    def tune(
        self, base: Base, data: Examples, run: Run, *, evaluation: Evaluation | None = None
    ) -> Delta:
        """Tune `base`; writes an adapter folder to `run.folder`, in it `scores` (every row's
        probability) and `suspicious.jsonl`, and returns the adapter as a Delta.

        Raises InputError for modules that the base does not have and for bases that a kind of
        module cannot be put on.
        """
        from deltaloom.tune._routing import CleanRouting, How

        model = self.attach(base, run.seed)
        how = How(**{name: getattr(self, name) for name in How.__dataclass_fields__})
        routing = CleanRouting(model, how, run)
        settings = self.train_settings(self.lr, trainable="adapter")
        model = train(model, base, data, run, self, settings, evaluation, objective=routing)
        result = run.work / "result"
        save_adapter(model, result, base, DELTAS[self.adapter])
        self._diagnose(routing, model, base, data, result)
        run.publish(result)
        return load(run.folder, base)

    def attach(self, base: Base, seed: int) -> Any:
        """`base` loaded, with fresh modules in float32 that `seed` decides."""
        size = self.size or SIZES[self.adapter]
        if self.adapter == "lora":
            lora = Lora(
                r=size,
                alpha=self.alpha,
                modules=self.modules,
                gradient_checkpointing=self.gradient_checkpointing,
            )
            return lora.attach(base, seed)
        from peft import PrefixTuningConfig, get_peft_model
        from transformers import set_seed

        set_seed(seed)
        task = "SEQ_CLS" if base.labels else "CAUSAL_LM"
        if self.adapter == "bottleneck":
            from deltaloom.core.adapters.bottleneck import BottleneckConfig

            config = BottleneckConfig(
                task_type=task, bottleneck_size=size, target_modules=self.modules
            )
        else:
            self._check_prefix(base)
            config = PrefixTuningConfig(task_type=task, num_virtual_tokens=size)
        loaded = base.load(new_head=True)
        try:
            model = get_peft_model(loaded, config)
        except ValueError as error:
            raise InputError(
                f"tune clear: modules = {self.modules}: {base.model} has no such modules, or none "
                f"are known for its kind ({error}); name them in modules"
            ) from None
        if self.gradient_checkpointing:
            # Frozen embeddings give activations without a gradient to recompute from.
            model.enable_input_require_grads()
        return model.train()

    def _check_prefix(self, base: Base) -> None:
        for wrong, why in (
            (self.modules is not None, "modules is not for prefixes, which every layer has"),
            (base.labels is not None, "PEFT cannot run a prefix on a sequence classifier"),
            (self.gradient_checkpointing, "a prefix cannot be recomputed (gradient_checkpointing)"),
        ):
            if wrong:
                raise InputError(f"tune clear: adapter = prefix: {why}; use lora or bottleneck")

    def _diagnose(
        self, routing: CleanRouting, model: Any, base: Base, data: Examples, folder: Path
    ) -> None:
        """Write every row's probability of a right label, and the rows below one half."""
        found = routing.last(model)
        clean, losses = found.clean.tolist(), found.losses.tolist()
        columns: dict[str, list[Any]] = {"source": [row.source for row in data], "loss": losses}
        if base.labels:
            columns["predicted"] = [base.labels[i] for i in routing.first_outcomes(found)]
        about = {"method": "clear", "base": base.fingerprint(), "data": data.digest()}
        Features.from_scores(folder / SCORES, data.ids, clean, about=about, columns=columns)
        below = sorted(
            (i for i in range(len(data)) if clean[i] < 0.5), key=lambda i: (clean[i], -losses[i])
        )
        columns["score"] = clean
        shown = {
            name: dict(zip(data.ids, values, strict=True))
            for name, values in columns.items()
            if name != "source"
        }
        data.take(below).write(folder / SUSPICIOUS, shown)
