"""Tune the elements of a fixed mask, by default those a full tuning moves most (LT-SFT).

Paper: Ansell et al. 2022, "Composable Sparse Fine-Tuning for Cross-Lingual Transfer" (arXiv
2110.07560), after the lottery tickets of Frankle & Carbin 2019 (arXiv 1803.03635).

Phase 1 tunes all adapted weights; the K elements with the largest |theta1 - theta0| over all of
them are the mask; phase 2 starts again from theta0 and tunes the mask alone. The result, theta2 -
theta0, is sparse, and those of a task and a language or domain compose by addition. `support` takes
other masks into the same phase 2: random elements, the largest |theta0|, the largest |sum of
gradients| at theta0.

Differs: the mask is over linear modules' weights, where the paper also takes embeddings, biases and
norms; the K are found by selection, without lists; phase 2 is a sparse adapter, so that weight
decay reaches the mask alone and optimizer state is kept for it alone.

Not covered: the L1 penalty on the change that the paper's language runs use, the mask found in
several rounds, the task tuned on top of the language's delta.
"""

from __future__ import annotations

import math
import shutil
from typing import TYPE_CHECKING, Annotated, Any, Literal, final

from pydantic import Field

from deltaloom.core.delta import Delta
from deltaloom.core.method import Evaluation, Sizes, Work
from deltaloom.tune._gradient import Count, Positive, rows_for, train
from deltaloom.tune._sparse import SparseTuner, publish

if TYPE_CHECKING:
    from torch import Tensor

    from deltaloom.core.base import Base
    from deltaloom.core.examples import Examples
    from deltaloom.core.run import Run

SUPPORT, DENSE = "support.safetensors", "dense"


@final
class Ltsft(SparseTuner):
    """Sparse tuning of a fixed mask; the result is a sparse PEFT adapter folder."""

    lr: Annotated[float, Field(gt=0)] = 5e-5
    """Peak learning rate of phase 2 (the authors' language runs: 5e-5)."""
    support: Literal["lottery", "random", "magnitude", "gradient"] = "lottery"
    """The mask: elements that a full tuning moves most, random ones, the largest weights, or the
    largest gradients of the first batches."""
    full_lr: Positive | None = None
    """Peak learning rate of phase 1; None takes `lr`, as the authors do."""
    full_epochs: Positive | None = None
    """Epochs of phase 1; None takes `epochs` (the authors' NLI runs: 5 and 5)."""
    batches: Count = 5
    """Batches whose gradients are summed, for `support: gradient` (as SpIEL's accumulation: 5)."""

    def work(self, sizes: Sizes) -> Work:
        """Phase 1 is a full tuning; phase 2 holds the base and the elements' state."""
        tokens, state = sizes.rows * sizes.row_tokens, self.state_bytes(sizes)
        full = {
            "lottery": (self.full_epochs or self.epochs) * tokens,
            "gradient": self.batches * self.batch_size * sizes.row_tokens,
        }.get(self.support, 0.0)
        dense = 16.0 if self.support == "lottery" else 8.0 if full else 0.0
        return Work(
            full_tokens=full,
            adapter_tokens=self.epochs * tokens,
            memory_bytes=max(dense * sizes.parameters, sizes.weight_bytes + state),
            disk_bytes=3 * state + (2 * 12.0 * sizes.parameters if dense == 16.0 else 0.0),
        )

    def tune(
        self, base: Base, data: Examples, run: Run, *, evaluation: Evaluation | None = None
    ) -> Delta:
        """Tune `base`; writes an adapter folder to `run.folder` and returns its Sparse Delta.

        `evaluation` watches phase 2.
        """
        from safetensors.torch import load_file

        from deltaloom.tune import _supports as supports

        path = run.work / SUPPORT
        if not path.exists():
            supports.write(self._support(base, data, run), path)
        shutil.rmtree(run.work / DENSE, ignore_errors=True)
        model = self.attach(base, load_file(path))
        settings = self.train_settings(self.lr, trainable="adapter")
        earlier = self._full_steps(len(data)) if self.support == "lottery" else 0
        model = train(model, base, data, run, self, settings, evaluation, earlier=earlier)
        return publish(model, base, run)

    def _full_steps(self, rows: int) -> int:
        return math.ceil(math.ceil(rows / self.batch_size) * (self.full_epochs or self.epochs))

    def _support(self, base: Base, data: Examples, run: Run) -> dict[str, Tensor]:
        """The mask, as rising flat indices of each adapted module."""
        from deltaloom.engine.forward import padding_token
        from deltaloom.tune import _supports as supports

        model = base.load(dtype="float32")
        layers = self.linear(model, base)
        names, count = list(layers), self.count(layers)
        if self.support == "random":
            sizes = {name: layer.layout.numel for name, layer in layers.items()}
            return supports.at_random(sizes, count, run.seed)
        if self.support == "magnitude":
            return supports.top(dict(supports.stored(base, names)), count)
        model.requires_grad_(False)
        if self.support == "gradient":
            tokenizer = base.tokenizer()
            rows = rows_for(base, tokenizer, data, self.max_length, run)
            rows = supports.sample(rows, self.batches * self.batch_size, run.seed)
            batch = self.micro_batch or self.batch_size
            found = supports.gradients(model, names, rows, padding_token(tokenizer), batch)
            return supports.top(found, count)
        return supports.top(self._moved(model, names, base, data, run), count)

    def _moved(
        self, model: Any, names: list[str], base: Base, data: Examples, run: Run
    ) -> dict[str, Tensor]:
        """What a full tuning of the modules `names` changes, float32."""
        from deltaloom.tune import _supports as supports

        modules = dict(model.named_modules())
        for name in names:
            modules[name].weight.requires_grad_(True)
        if self.gradient_checkpointing:
            model.enable_input_require_grads()
        settings = self.train_settings(
            self.full_lr or self.lr, epochs=self.full_epochs or self.epochs
        )
        model = train(model.train(), base, data, run, self, settings, None, folder=DENSE)
        moved = {}
        for name, before in supports.stored(base, names):
            moved[name] = modules[name].weight.detach().cpu() - before
        return moved
