"""Tune on preferences: KTO as published, DPO and its kin, through TRL's trainers.

Paper: Ethayarajh et al. 2024, "KTO: Model Alignment as Prospect Theoretic Optimization" (arXiv
2402.01306), as in the small-model pipeline of Zhai 2024, "A Post-Training Enhanced Optimization
Approach for Small Language Models" (arXiv 2411.02939); DPO: Rafailov et al. 2023 (arXiv
2305.18290), robust DPO: Chowdhury et al. 2024 (arXiv 2403.00409), IPO: Azar et al. 2023 (arXiv
2310.12036), APO: D'Oosterlinck et al. 2024 (arXiv 2408.06266).

With h = log pi(y|x) / pi_ref(y|x) and z the KL of pi from pi_ref, estimated on mismatched rows of
the batch: KTO's loss is w_D (1 - sigmoid(beta (h - z))) for a desirable answer and
w_U (1 - sigmoid(beta (z - h))) for an undesirable one. DPO: -log sigmoid(beta (h_chosen -
h_rejected)). The reference is the base as it is given.

Rows are pairs (`chosen`, `rejected`), labelled answers (`completion`, `label`), `candidates` with
`scores` (best against worst), or `choices` with `answer` (right against a wrong one): preferences
that a program makes. Pairs serve every loss, labelled answers KTO and apo_zero_unpaired.

Differs: rows longer than `max_length` are left out and counted, where TRL cuts the answer that is
judged; KTO's rows are shuffled once, so that a pair's rows are not each other's mismatch.

Not covered: a reference that follows the model; losses combined; preferences over images.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Literal, Self, final

from pydantic import Field, model_validator

from deltaloom.core.delta import Delta, load
from deltaloom.core.errors import InputError
from deltaloom.core.method import Evaluation, Sizes, Work
from deltaloom.tune._gradient import GradientTuner
from deltaloom.tune.full import save_model
from deltaloom.tune.lora import Lora, save_adapter

if TYPE_CHECKING:
    from deltaloom.core.base import Base
    from deltaloom.core.examples import Examples
    from deltaloom.core.run import Run

LR = {"lora": 1e-5, "full": 1e-6}
"""TRL's default for whole models, and ten times that for adapters, as its guide advises."""
UNPAIRED = ("kto", "apo_zero_unpaired")


@final
class Prefer(GradientTuner):
    """Preference tuning; the result is an adapter or a model folder."""

    preferences = True

    loss: Literal[
        "kto",
        "apo_zero_unpaired",
        "dpo",
        "ipo",
        "hinge",
        "robust",
        "exo_pair",
        "nca_pair",
        "bco_pair",
        "sppo_hard",
        "aot",
        "apo_zero",
        "apo_down",
        "discopop",
    ] = "kto"
    """What is minimised; names but `dpo` are TRL's. `robust` is DPO for preferences of which some,
    a part `label_smoothing`, are turned round."""
    beta: Annotated[float, Field(gt=0)] = 0.1
    """How strongly the reference holds (KTO, DPO and TRL: 0.1)."""
    desirable_weight: Annotated[float, Field(gt=0)] = 1.0
    """KTO's w_D (TRL: 1). With unequal counts of the two kinds the paper advises weights that make
    w_D n_D / (w_U n_U) 1 to 1.33."""
    undesirable_weight: Annotated[float, Field(gt=0)] = 1.0
    """KTO's w_U (TRL: 1)."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Probability that a pair is the wrong way round, for dpo, robust and exo_pair (TRL: 0)."""
    epochs: Annotated[float, Field(gt=0)] = 1.0
    """Passes over the data (KTO and DPO: 1)."""
    tuned: Literal["lora", "full"] = "lora"
    """What is tuned: LoRA factors, or every parameter (KTO and the small-model pipeline: all)."""
    lr: Annotated[float, Field(gt=0)] | None = None
    """Peak learning rate. None takes 1e-6 for full (TRL; the small-model pipeline: 5e-8) and 1e-5
    for LoRA."""
    r: Annotated[int, Field(ge=1)] = 8
    """LoRA's rank (PEFT's default: 8)."""
    alpha: Annotated[float, Field(gt=0)] = 16.0
    """LoRA's scaling is alpha / r (QLoRA: 16)."""
    modules: list[str] | None = None
    """Names of the modules that LoRA adapts, by their last part; None adapts every linear module
    but the output head."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.modules is not None and self.tuned == "full":
            raise ValueError("'modules' narrows LoRA; leave it out with tuned = full")
        if self.loss == "robust" and not self.label_smoothing:
            raise ValueError("loss = robust needs label_smoothing, the part of pairs turned round")
        return self

    @property
    def unpaired(self) -> bool:
        """Whether the loss takes answers one by one."""
        return self.loss in UNPAIRED

    def work(self, sizes: Sizes) -> Work:
        """Two answers a row, and the reference's forward passes (KTO's mismatched rows too)."""
        tokens = 2 * self.epochs * sizes.rows * sizes.row_tokens
        beside = (3 if self.loss == "kto" else 1) * tokens
        if self.tuned == "full":
            return Work(
                full_tokens=tokens,
                forward_tokens=beside,
                memory_bytes=20.0 * sizes.parameters,
                disk_bytes=2 * 12.0 * sizes.parameters + sizes.weight_bytes,
            )
        inner = self._lora().work(sizes)
        return replace(inner, adapter_tokens=tokens, forward_tokens=beside)

    def tune(
        self, base: Base, data: Examples, run: Run, *, evaluation: Evaluation | None = None
    ) -> Delta:
        """Tune `base`; writes an adapter or model folder to `run.folder`.

        Raises InputError naming the row that says no preference or a wrong one, and where TRL is
        not installed.
        """
        try:
            from deltaloom.tune import _preferring
        except ModuleNotFoundError as error:
            if error.name != "trl":
                raise
            raise InputError(
                "tune prefer needs TRL: pip install 'deltaloom[prefer]' (or trl)"
            ) from None
        from deltaloom.tune._preferences import read

        pairs, judged = read(data, run.seed)
        if judged and not self.unpaired:
            raise InputError(
                f"{judged[0].where}: a labelled answer is no pair; loss = {self.loss} needs "
                f"'chosen' and 'rejected', loss = {' and '.join(UNPAIRED)} do not"
            )
        run.note(pairs=len(pairs), labelled_rows=len(judged))
        lora = self._lora() if self.tuned == "lora" else None
        adapts = "adapter" if lora else "all"
        settings = self.train_settings(self.lr or LR[self.tuned], trainable=adapts)
        model = _preferring.train(base, pairs, judged, self, lora, settings, run, evaluation)
        result = run.work / "result"
        if lora is not None:
            save_adapter(model, result, base)
        else:
            save_model(model, result, base)
        run.publish(result)
        return load(run.folder, base)

    def _lora(self) -> Lora:
        names = Lora.model_fields.keys() & type(self).model_fields.keys() - {"lr"}
        own = {name: getattr(self, name) for name in names}
        return Lora(**own, lr=self.lr or LR["lora"])
