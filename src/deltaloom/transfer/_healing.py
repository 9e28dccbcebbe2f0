"""Healing: the moved model's embeddings tuned on text, all else frozen.

Paper: tuning embeddings alone is de Vries & Nissim 2021 (arXiv 2012.05628); cross-tokenizer
distillation is Minixhofer et al. 2025 (ALM, arXiv 2503.20083), see `_distillation.py`.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from deltaloom.core.errors import InputError
from deltaloom.core.method import Sizes, Transferrer, Work
from deltaloom.core.progress import say

if TYPE_CHECKING:
    from deltaloom.core.base import Base
    from deltaloom.core.examples import Examples
    from deltaloom.core.run import Run

Count = Annotated[int, Field(ge=1)]


class Healing(Transferrer):
    """Abstract: what heals a model after its tokenizer was changed."""

    heal: Literal["none", "tune", "distill"] = "none"
    """Tune the embeddings on `data` after the move: by the text's likelihood (tune), or also
    towards the base's own likelihoods of the same stretches of bytes (distill, ALM). None as a
    default, since it needs text like the base's own."""
    lr: Annotated[float, Field(gt=0)] = 1e-3
    """Peak learning rate of healing (ours; models of 260K parameters healed best with 0.03)."""
    epochs: Annotated[float, Field(gt=0)] = 1.0
    """Passes over the text in healing (ours)."""
    batch_size: Count = 16
    """Rows per optimizer step in healing (as `tune full` has it)."""
    max_length: Count | None = None
    """Tokens per row at most in healing; None takes the model's context."""

    def check_data(self, data: Examples | None) -> None:
        """Raise InputError when healing is asked for without text; tell of text for nothing."""
        if self.heal != "none" and data is None:
            raise InputError(
                f"heal = {self.heal} needs data=, rows of text like those the base has learned from"
            )
        if self.heal == "none" and data is not None and "data" not in self.needs:
            say("heal = none: nothing is tuned on data=; heal=tune or heal=distill does that")

    def healing_work(self, sizes: Sizes) -> Work:
        """One frozen model with trained tables; distilling runs the base as well."""
        if self.heal == "none":
            return Work()
        tokens = self.epochs * sizes.rows * sizes.row_tokens
        return Work(
            forward_tokens=sizes.rows * sizes.row_tokens if self.heal == "distill" else 0.0,
            adapter_tokens=tokens,
            memory_bytes=12.0 * (sizes.parameters - sizes.matmul_parameters),
            disk_bytes=2.0 * sizes.weight_bytes,
        )

    def steps_before_healing(self) -> int:
        """Steps that the method has logged by then."""
        return 0

    def heal_model(self, base: Base, made: Path, data: Examples | None, run: Run) -> Path:
        """The folder of the healed model, `made` itself when nothing was asked for."""
        if self.heal == "none" or data is None:
            return made
        from deltaloom.core.delta import describe
        from deltaloom.core.encoding import encode
        from deltaloom.engine.forward import padding_token
        from deltaloom.engine.train import TrainSettings, fit

        moved: Base = base.model_copy(update={"model": str(made), "revision": None})
        limit = min(self.max_length or moved.max_length, moved.max_length)
        tokenizer = moved.tokenizer()
        rows = encode(data, tokenizer, limit)
        objective = None
        if self.heal == "distill":
            from deltaloom.transfer._distillation import Distillation

            objective = Distillation.prepare(base, moved, data, rows, run)
        model = moved.load(dtype="float32").train()
        model.requires_grad_(False)
        for table in (model.get_input_embeddings(), model.get_output_embeddings()):
            if table is not None:  # some tied models name the input's alone
                table.requires_grad_(True)
        settings = TrainSettings(
            epochs=self.epochs, lr=self.lr, batch_size=self.batch_size, trainable="adapter"
        )
        pad = padding_token(tokenizer)
        fitted = fit(
            model,
            rows,
            pad,
            settings,
            run,
            tokenizer=tokenizer,
            objective=objective,
            earlier=self.steps_before_healing(),
        )
        run.note(healing_rows=len(rows), healing_steps=fitted.steps)
        healed = run.work / "healed"
        shutil.rmtree(healed, ignore_errors=True)
        self._write(fitted.model, moved, base, healed)
        describe(healed, "vocab", base)
        return healed

    def _write(self, model: Any, moved: Base, base: Base, out: Path) -> None:
        """The moved model's folder with the trained tables in it."""
        from deltaloom.core.deltas.vocab import Vocab, table_names

        names = table_names(moved)
        modules = (model.get_input_embeddings(), model.get_output_embeddings())
        tables = {
            name: (modules[place] or modules[0]).weight.detach().cpu()
            for place, name in enumerate(names)
        }
        Vocab(base, Path(moved.model), tables).write_model(out)
