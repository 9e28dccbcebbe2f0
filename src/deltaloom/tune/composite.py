"""Tune a mixture of bottlenecks, low ranks, sparse changes and prefixes, as one adapter.

Paper: Zhou et al. 2024, "AutoPEFT: Automatic Configuration Search for Parameter-Efficient
Fine-Tuning" (TACL, arXiv 2301.12132), whose building blocks these are; the modules are from
Pfeiffer et al. 2021 (serial), He et al. 2022 (parallel), Li & Liang 2021 (prefix), Hu et al. 2021
(lora) and Bhardwaj et al. 2024 (SHiRA, arXiv 2406.13175: sparse).

With h the input of a layer's feed-forward f: serial f + U gelu(D f), parallel f + 4 U gelu(D h),
lora W x + 2 B A x and sparse W x + S x at queries and values (S changes as many elements, at random
places, as a low rank has parameters), prefix further keys and values; 0 leaves a kind out.

Differs: prefixes are trained directly, where AutoPEFT's come from a small network; LoRA and sparse
are ours to add.

Not covered: choosing or moving the elements of sparse changes, merging into the base, sequence
classifiers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, final

from pydantic import Field, model_validator

from deltaloom.core.delta import Delta, load
from deltaloom.core.errors import InputError
from deltaloom.core.method import Evaluation, Sizes, Work
from deltaloom.tune._gradient import GradientTuner, train
from deltaloom.tune.lora import save_adapter

if TYPE_CHECKING:
    from deltaloom.core.base import Base
    from deltaloom.core.examples import Examples
    from deltaloom.core.run import Run

Size = Annotated[int, Field(ge=0)]


@final
class Composite(GradientTuner):
    """Mixed modules; the result is a PEFT adapter folder of our own kind."""

    lr: Annotated[float, Field(gt=0)] = 2e-4
    """Peak learning rate (QLoRA, table 9: 2e-4; AutoPEFT: 1e-4)."""
    serial: Size = 8
    """Width of the bottleneck after the feed-forward (ours); 0 for none."""
    parallel: Size = 8
    """Width of the bottleneck beside the feed-forward (ours); 0 for none."""
    lora: Size = 0
    """Rank of the change of queries and values; 0 for none."""
    sparse: Size = 0
    """Changed elements of queries' and values' weights, as many as this rank of lora has
    parameters; 0 for none."""
    prefix: Size = 4
    """Keys and values put before the others' (ours); 0 for none."""
    layers: list[Annotated[int, Field(ge=0)]] | None = None
    """Numbers of the layers that have them, from 0; None is all."""

    @model_validator(mode="after")
    def _something(self) -> Composite:
        if not (self.serial or self.parallel or self.lora or self.sparse or self.prefix):
            raise ValueError("serial, parallel, lora, sparse, prefix are all 0: nothing to train")
        if self.layers == []:
            raise ValueError("layers = []: no layer is left to train")
        return self

    def work(self, sizes: Sizes) -> Work:
        """The base, and float32 modules with gradient and Adam's moments; no activations."""
        # Seven linear modules a layer, each with one side or two as long as the width.
        size = self.serial + self.parallel + self.lora + self.sparse + self.prefix
        own = 4.0 * size * sizes.linear_sides / 7
        return Work(
            adapter_tokens=self.epochs * sizes.rows * sizes.row_tokens,
            memory_bytes=sizes.weight_bytes + 4 * own,
            disk_bytes=2 * 3 * own + own,
        )

    def tune(
        self, base: Base, data: Examples, run: Run, *, evaluation: Evaluation | None = None
    ) -> Delta:
        """Tune `base`; writes an adapter folder to `run.folder` and returns its Delta."""
        model = self.attach(base, run.seed)
        settings = self.train_settings(self.lr, trainable="adapter")
        model = train(model, base, data, run, self, settings, evaluation)
        result = run.work / "result"
        save_adapter(model, result, base, "composite")
        run.publish(result)
        return load(run.folder, base)

    def attach(self, base: Base, seed: int) -> Any:
        """`base` loaded, with fresh modules in float32 that `seed` decides."""
        from peft import get_peft_model
        from transformers import set_seed

        from deltaloom.core.adapters.composite import CompositeConfig

        depth = base.config().get("num_hidden_layers", 0)
        wrong = [number for number in self.layers or () if number >= depth]
        if wrong:
            raise InputError(
                f"tune composite: layers = {self.layers}: {base.model} has no layer {wrong[0]}; "
                f"its {depth} layers count from 0"
            )
        set_seed(seed)
        config = CompositeConfig(
            task_type="CAUSAL_LM",
            serial=self.serial,
            parallel=self.parallel,
            lora=self.lora,
            sparse=self.sparse,
            prefix=self.prefix,
            layers_to_transform=self.layers,
        )
        try:
            model = get_peft_model(base.load(), config)
        except ValueError as error:
            raise InputError(
                f"tune composite: no layers with self_attn and mlp in {base.model} ({error})"
            ) from None
        if self.gradient_checkpointing:
            if self.prefix:
                raise InputError(
                    "tune composite: a prefix cannot be recomputed; leave out "
                    "gradient_checkpointing or set prefix=0"
                )
            model.enable_input_require_grads()
        return model.train()
