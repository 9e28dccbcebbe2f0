"""Tune in the memory of inference, by the loss at two points along a random direction (MeZO).

Paper: Malladi et al. 2023, "Fine-Tuning Language Models with Just Forward Passes" (arXiv
2305.17333); low-rank directions as Chen et al. 2024, "Enhancing Zeroth-order Fine-tuning for
Language Models with Low-rank Structures" (LOZO, arXiv 2410.07698).

g = (L(p + eps z) - L(p - eps z)) / (2 eps); p -= lr g z, with z random and E[z z'] = 1. Several
perturbations a step are averaged; `update` puts momentum or Adam on g z.

Differs: z is low-rank, z = U V' / sqrt(r), where the paper's is Gaussian (`direction=gaussian`);
both signs run in one batch through hooks and the weights are never perturbed, so nothing is lost in
restoring them; LOZO leaves out the root and keeps V for many steps. 16-bit weights take their steps
by stochastic rounding, where the official code loses most of a small step. The loss is the
response tokens' mean cross-entropy, as in training by gradient, where the paper scores label words.
The result is a trace (seed and scalars) of a few bytes a step; of LoRA and prefix an adapter.

Not covered: weight decay; layerwise scaling by gradient or parameter norms; several devices that
share a step; `rademacher` and `gaussian` drawn on a GPU (the CPU draws them, which takes long for
billions of weights).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, final

from pydantic import Field, model_validator

from deltaloom.core.delta import Delta, load
from deltaloom.core.errors import InputError
from deltaloom.core.method import Evaluation, Sizes, Tuner, Work
from deltaloom.tune._gradient import Count, Positive, rows_for

if TYPE_CHECKING:
    from deltaloom.core.base import Base
    from deltaloom.core.deltas.descent import Rule
    from deltaloom.core.examples import Examples
    from deltaloom.core.run import Run
    from deltaloom.engine.descend import Objective

LR = {"full": 1e-6, "lora": 1e-4, "prefix": 1e-2}
EPS = {"full": 1e-3, "lora": 1e-2, "prefix": 1e-1}
"""The official repository's for OPT-13B, by what is tuned."""
SHOWN = 3
"""Parameter names in a message."""


@final
class Mezo(Tuner):
    """MeZO; the result is a trace, or an adapter folder for LoRA and prefix."""

    tuned: Literal["full", "lora", "prefix"] = "full"
    """What is tuned: the base's own parameters, LoRA factors, or a prefix of keys and values."""
    parameters: str | None = None
    """Regular expression; only parameters in whose names it is found are tuned, as
    `layers\\.(10|11)\\.` or `self_attn`. None tunes all that `tuned` says."""
    steps: Count = 500
    """Steps, of two forward passes per perturbation. Ours, for a first look: the paper takes
    20,000 for OPT-13B and 100,000 for RoBERTa-large."""
    batch_size: Count = 16
    """Rows per step (the paper, OPT-13B: 16)."""
    micro_batch: Count | None = None
    """Rows per forward pass. Smaller saves memory and changes nothing else: losses are added and
    weighted by tokens."""
    lr: Positive | None = None
    """Learning rate. None takes the official 1e-6 for full, 1e-4 for LoRA, 1e-2 for a prefix (OPT
    of 13B); small models want much more. `momentum` and `adam` have no published one."""
    eps: Positive | None = None
    """Length of a perturbation. None takes the official 1e-3 for full, 1e-2 for LoRA, 1e-1 for a
    prefix."""
    direction: Literal["lowrank", "rademacher", "gaussian"] = "lowrank"
    """Directions: low-rank (fastest), random signs, or the published Gaussian, which moves the
    weights in place."""
    rank: Count = 1
    """Rank of low-rank directions (LOZO: 1 or 2)."""
    perturbations: Count = 1
    """Directions averaged per step (the paper: 1)."""
    update: Literal["sgd", "momentum", "adam"] = "sgd"
    """Form of the step; `momentum` keeps one float32 number per parameter, `adam` two."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the momentum and Adam's first (torch's default for Adam: 0.9)."""
    decay: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Adam's decay of squares (torch's default: 0.999)."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate over the steps (the official script: constant)."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the steps in which the learning rate rises (the official script: none)."""
    objective: Annotated[
        str, Field(pattern=r"^(loss|accuracy|exact_match|[A-Za-z_][\w.]*:[A-Za-z_]\w*)$")
    ] = "loss"
    """What is minimised: the response tokens' loss, or minus `accuracy` (over rows' choices),
    `exact_match` (of greedy answers), or a reward `module:function`, called with the rows
    (`Example`) and the answers (texts), giving one number for each row, more being better."""
    new_tokens: Count = 32
    """Tokens of an answer to be rewarded (ours)."""
    r: Count = 8
    """Rank of LoRA (the paper: 8)."""
    alpha: Positive = 16.0
    """LoRA's scaling is alpha / r (the paper: 16)."""
    virtual_tokens: Count = 5
    """Length of the prefix, which starts as the keys and values of random tokens (the paper: 5)."""
    max_length: Count | None = None
    """Tokens per row at most; None takes the model's context. Longer rows lose prompt first."""
    patience: Count = 3
    """Evaluations without a better one before stopping, when `evaluate` is given (ours)."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.lr is None and self.update != "sgd":
            raise ValueError(f"update = {self.update} has no published lr; give lr")
        try:
            re.compile(self.parameters or "")
        except re.error as error:
            raise ValueError(f"parameters = {self.parameters!r}: {error}") from None
        return self

    def work(self, sizes: Sizes) -> Work:
        """Two forward passes per perturbation, in the memory of inference; no activations."""
        passes = 2.0 * self.perturbations * self.steps
        kept = {"sgd": 0, "momentum": 4, "adam": 8}[self.update]
        tuned = sizes.parameters if self.tuned == "full" else self.r * sizes.linear_sides
        return Work(
            forward_tokens=passes * min(self.batch_size, sizes.rows) * sizes.row_tokens,
            memory_bytes=sizes.weight_bytes + kept * tuned,
            disk_bytes=4.0 * (self.perturbations + 1) * self.steps,
        )

    def tune(
        self, base: Base, data: Examples, run: Run, *, evaluation: Evaluation | None = None
    ) -> Delta:
        """Tune `base`; writes a trace or an adapter to `run.folder` and returns its Delta."""
        from deltaloom.core.deltas.trace import STORED, Trace
        from deltaloom.engine.descend import DescendSettings, descend

        tokenizer = base.tokenizer()
        room = base.max_length - (self.virtual_tokens if self.tuned == "prefix" else 0)
        limit = min(self.max_length or room, room)
        if not len(data):
            raise InputError(f"{data.name}: holds no rows to tune on")
        model = self._model(base, tokenizer, run.seed)
        names = self._names(model)
        objective = self._objective(model, base, tokenizer, data, limit, run)
        start = {} if self.tuned == "full" else _copies(model, names)
        steps = descend(
            model,
            names,
            self._rule(run.seed),
            len(data),
            objective,
            DescendSettings(
                self.steps,
                self.batch_size,
                self.lr or LR[self.tuned],
                self.perturbations,
                self.schedule,
                self.warmup,
                self.patience,
            ),
            run,
            tokenizer=tokenizer,
            evaluation=evaluation,
        )
        run.note(steps=len(steps.found), parameters=_count(steps), tensors=len(names))
        result = run.work / "result"
        if self.tuned == "full":
            Trace(base, steps).save(result)
        else:
            _write_adapter(model, base, result, self.tuned, steps, start)
            steps.save(result / STORED, start)
        run.publish(result)
        return load(run.folder, base)

    def _rule(self, seed: int) -> Rule:
        from deltaloom.core.deltas.descent import Rule

        return Rule(
            seed=seed,
            direction=self.direction,
            rank=self.rank,
            eps=self.eps or EPS[self.tuned],
            update=self.update,
            momentum=self.momentum,
            decay=self.decay,
        )

    def _model(self, base: Base, tokenizer: Any, seed: int) -> Any:
        """What runs, in evaluation mode: without dropout, as the official code does."""
        if self.tuned == "full":
            base.refuse_change()
            return base.load()
        if self.tuned == "lora":
            from deltaloom.tune.lora import Lora

            return Lora(r=self.r, alpha=self.alpha).attach(base, seed).eval()
        return _with_prefix(base, self.virtual_tokens, len(tokenizer), seed)

    def _names(self, model: Any) -> list[str]:
        """Parameters that are tuned, as the model names them."""
        own = [
            name
            for name, parameter in model.named_parameters()
            if parameter.is_floating_point() and (self.tuned == "full" or parameter.requires_grad)
        ]
        found = [name for name in own if re.search(self.parameters or "", name)]
        if not found:
            raise InputError(
                f"parameters = {self.parameters!r} is found in no name; names are like "
                + ", ".join(own[:: max(1, len(own) // SHOWN)][:SHOWN])
            )
        return found

    def _objective(
        self, model: Any, base: Base, tokenizer: Any, data: Examples, limit: int, run: Run
    ) -> Objective:
        from deltaloom.tune import _objectives as others

        if self.objective == "accuracy":
            return others.Accuracy(model, tokenizer, data, limit)
        if ":" in self.objective:
            reward = others.imported(self.objective)
            return others.Rewarded(model, tokenizer, data, reward, lambda _: self.new_tokens)
        rows = rows_for(base, tokenizer, data, limit, run)
        if self.objective == "exact_match":
            return others.exact_match(model, tokenizer, data, rows)
        from deltaloom.engine.forward import padding_token
        from deltaloom.engine.response_loss import ResponseLoss

        return ResponseLoss(model, rows, padding_token(tokenizer), self.micro_batch)


def _with_prefix(base: Base, length: int, vocabulary: int, seed: int) -> Any:
    """`base` with a trainable prefix: the keys and values of random tokens (the paper's start)."""
    import torch
    from peft import PrefixTuningConfig, get_peft_model, initialize_kv_prefix_from_past_key_values

    model = base.load()
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocabulary, (1, length), generator=generator).to(model.device)
    with torch.no_grad():
        found = model(input_ids=ids, use_cache=True).past_key_values
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=length)
    model = get_peft_model(model, config)  # pyright: ignore[reportArgumentType]
    initialize_kv_prefix_from_past_key_values(model, past_key_values=found)
    return model.eval()


def _copies(model: Any, names: list[str]) -> dict[str, Any]:
    parameters = dict(model.named_parameters())
    return {name: parameters[name].detach().clone() for name in names}


def _count(steps: Any) -> int:
    from math import prod

    return sum(prod(form.shape) for form in steps.parameters.values())


def _write_adapter(
    model: Any, base: Base, folder: Path, tuned: str, steps: Any, start: dict[str, Any]
) -> None:
    """The adapter as `steps` leave it: the model itself may have taken more of them."""
    from deltaloom.tune.lora import save_adapter

    parameters = dict(model.named_parameters())
    for name, value in start.items():
        parameters[name].data.copy_(value)
    steps.replay({name: parameters[name].data for name in start})
    save_adapter(model, folder, base, "lowrank" if tuned == "lora" else "prompt")
