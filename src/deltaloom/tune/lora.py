"""Tune low-rank adapters beside frozen weights (LoRA), through PEFT.

Paper: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv 2106.09685);
rank-stabilised scaling from Kalajdzievski 2023 (arXiv 2312.03732).

W' = W + (alpha / r) B A with A (r, in) random, B (out, r) zero; only A and B are trained.

Differs: all linear modules but the output head carry an adapter (QLoRA, section 4, finds this is
what matters), where the paper adapts attention only; `modules` narrows it.

Not covered: DoRA and other variants that are no low-rank change.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, final

from pydantic import Field

from deltaloom.core.atomic import write_json
from deltaloom.core.delta import Delta, describe, load
from deltaloom.core.errors import InputError
from deltaloom.core.method import Evaluation, Sizes, Work
from deltaloom.tune._gradient import GradientTuner, train

if TYPE_CHECKING:
    from deltaloom.core.base import Base
    from deltaloom.core.examples import Examples
    from deltaloom.core.run import Run


@final
class Lora(GradientTuner):
    """LoRA; the result is a PEFT adapter folder."""

    classifiers = True

    lr: Annotated[float, Field(gt=0)] = 2e-4
    """Peak learning rate (QLoRA, table 9: 2e-4)."""
    r: Annotated[int, Field(ge=1)] = 8
    """Rank of each module's change (PEFT's default: 8)."""
    alpha: Annotated[float, Field(gt=0)] = 16.0
    """Numerator of the scaling alpha / r (QLoRA: 16)."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapters' input (PEFT's default: 0)."""
    rslora: bool = False
    """Scale by alpha / sqrt(r), so that the step does not shrink with the rank."""
    lr_width: Annotated[int | None, Field(ge=1)] = None
    """Hidden size of the model on which lr was found, as a smaller one of the same family: the
    factor that maps the width to the rank gets lr x lr_width / width, the other one lr (LoRA+'s
    scaling, arXiv 2402.12354). None takes lr as it is."""
    lr_rank: Annotated[int | None, Field(ge=1)] = None
    """Rank at which lr was found: with rslora the factor from the rank gets lr times the root of
    lr_rank / r; without, lr holds for every rank. None takes lr as it is."""
    modules: list[str] | None = None
    """Names of the modules to adapt, by their last part (`[q_proj, v_proj]`); None adapts every
    linear module but the output head."""
    start: str | None = None
    """Go on from the LoRA adapter in this folder, of the same base: one that `tune meta` or `tune
    lora` wrote. r, alpha, dropout, rslora and modules are then the adapter's."""

    def work(self, sizes: Sizes) -> Work:
        """The base, and float32 factors with gradient and Adam's moments; no activations."""
        factors = 4.0 * self.r * sizes.linear_sides
        return Work(
            adapter_tokens=self.epochs * sizes.rows * sizes.row_tokens,
            memory_bytes=sizes.weight_bytes + 4 * factors,
            disk_bytes=2 * 3 * factors + factors,
        )

    def tune(
        self, base: Base, data: Examples, run: Run, *, evaluation: Evaluation | None = None
    ) -> Delta:
        """Tune `base`; writes an adapter folder to `run.folder` and returns its LowRank Delta."""
        model = self.attach(base, run.seed)
        settings = self.train_settings(self.lr, trainable="adapter")
        how = self._rates(model)
        model = train(model, base, data, run, self, settings, evaluation, companion=how)
        result = run.work / "result"
        save_adapter(model, result, base)
        run.publish(result)
        return load(run.folder, base)

    def _rates(self, model: Any) -> Any:
        """What gives the factors their learning rates, where lr is from another size."""
        if self.lr_width is None and self.lr_rank is None:
            return None
        from deltaloom.engine.scaled_adam import LoraScaled

        width = model.config.get_text_config().hidden_size
        own = model.active_peft_config
        return LoraScaled(
            width / (self.lr_width or width), own.r / (self.lr_rank or own.r), own.use_rslora
        )

    def config(self, base: Base) -> Any:
        """The adapters as PEFT takes them."""
        from peft import LoraConfig

        return LoraConfig(
            task_type="SEQ_CLS" if base.labels else "CAUSAL_LM",
            r=self.r,
            lora_alpha=self.alpha,  # pyright: ignore[reportArgumentType]
            lora_dropout=self.dropout,
            use_rslora=self.rslora,
            target_modules=self.modules or "all-linear",
        )

    def attach(self, base: Base, seed: int) -> Any:
        """`base` loaded, with adapters in float32: those of `start`, or fresh ones that `seed`
        decides."""
        from peft import get_peft_model
        from transformers import set_seed

        set_seed(seed)
        config = self.config(base)
        if self.start is not None:
            model = adapted(base, self.start)
        else:
            loaded = base.load(new_head=True)
            try:
                model = get_peft_model(loaded, config)
            except ValueError as error:
                raise InputError(
                    f"tune lora: modules = {self.modules}: {base.model} has no such modules "
                    f"({error})"
                ) from None
        if self.gradient_checkpointing:
            # Frozen embeddings give activations without a gradient to recompute from.
            model.enable_input_require_grads()
        return model.train()


def adapted(base: Base, start: str) -> Any:
    """`base` loaded with the LoRA adapter in the folder `start`, to be trained further.

    Raises InputError for an adapter of another base or kind.
    """
    from peft import PeftModel

    found = load(start, base)
    folder = getattr(found, "folder", None)
    if found.kind != "lowrank" or folder is None:
        raise InputError(
            f"start: {start} holds a {found.kind} delta and no LoRA adapter; name a folder that "
            "tune lora or tune meta wrote"
        )
    return PeftModel.from_pretrained(base.load(new_head=True), str(folder), is_trainable=True)


def save_adapter(model: Any, folder: Path, base: Base, kind: str = "lowrank") -> None:
    """Write a PEFT adapter folder, of a Delta of `kind`, whose bytes the weights alone decide."""
    model.save_pretrained(folder)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    # PEFT writes sets, whose order changes from process to process.
    for key, value in config.items():
        if isinstance(value, list) and all(isinstance(one, str) for one in value):
            config[key] = sorted(value)
    config["base_model_name_or_path"] = base.model
    write_json(path, config)
    (folder / "README.md").unlink(missing_ok=True)
    describe(folder, kind, base)
