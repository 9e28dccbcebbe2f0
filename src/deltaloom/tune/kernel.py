"""Adapt LoRA to a few rows in closed form: the end of gradient flow on the model's linearisation.

Paper: Zhou et al. 2021, "Meta-Learning with Neural Tangent Kernels" (arXiv 2102.03909), the
adaptation of Meta-RKHS-II; the kernel is Jacot et al. 2018's (arXiv 1806.07572).

With f (n,) the rows' mean cross-entropies, J their gradients by LoRA's factors and K = J J', the
factors change by J' K^-1 (I - exp(-t K)) (0 - f): what gradient flow on the squares of f would do
in time t, in units of n / trace K, if f were linear. No learning rate, no steps.

Differs: outputs are cross-entropies with target zero instead of scores of classes, and the changed
factors are kept, so that the network itself answers and not its linearisation. J is never held: K
comes in blocks and the change is one more backward pass, of the rows' weighted sum.

Not covered: more than some thousand rows, as K is (n, n) and its exponential n^3: use tune lora.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

from deltaloom.core.delta import Delta, load
from deltaloom.core.errors import InputError
from deltaloom.core.method import Evaluation, Sizes, Tuner, Work
from deltaloom.tune._gradient import Count, Positive, rows_for
from deltaloom.tune.lora import Lora, save_adapter

if TYPE_CHECKING:
    from deltaloom.core.base import Base
    from deltaloom.core.encoding import Encoded
    from deltaloom.core.examples import Examples
    from deltaloom.core.run import Run

MOST = 4096
"""Rows, whose kernel takes 128 MiB."""


@final
class Kernel(Tuner):
    """Closed-form adaptation; the result is a PEFT adapter folder."""

    start: str | None = None
    """The LoRA adapter to adapt, of the same base: one that `tune meta` learned for this. None
    begins with fresh factors, which the closed form was not meant for: expect little."""
    time: Positive = 10.0
    """Time of the flow: an average direction keeps exp(-time) of its error (as in `tune meta`)."""
    r: Count = 8
    """Rank of fresh factors (as in `tune lora`)."""
    alpha: Positive = 16.0
    """Numerator of the scaling alpha / r of fresh factors (as in `tune lora`)."""
    modules: list[str] | None = None
    """Names of the modules that fresh factors adapt, by their last part; None adapts every linear
    module but the output head."""
    max_length: Count | None = None
    """Tokens per row at most; None takes the model's context. Longer rows lose prompt first."""

    def work(self, sizes: Sizes) -> Work:
        """Two passes over the rows; the base, the kernel, and a block of the rows' gradients."""
        factors = 4.0 * self.r * sizes.linear_sides
        return Work(
            adapter_tokens=2 * sizes.rows * sizes.row_tokens,
            memory_bytes=sizes.weight_bytes + factors * min(sizes.rows + 2, 64),
            disk_bytes=factors,
        )

    def tune(
        self, base: Base, data: Examples, run: Run, *, evaluation: Evaluation | None = None
    ) -> Delta:
        """Adapt to the rows of `data`; writes an adapter folder to `run.folder`.

        Raises InputError for more than `MOST` rows, and for `evaluate`.
        """
        import torch

        from deltaloom.engine.forward import padding_token

        if evaluation is not None:
            raise InputError(
                "tune kernel makes one change and has nothing to evaluate on the way; leave out "
                "evaluate, and measure the result"
            )
        if not 0 < len(data) <= MOST:
            raise InputError(
                f"{data.name}: has {len(data)} rows, and tune kernel takes 1 to {MOST}; use "
                "tune lora"
            )
        tokenizer = base.tokenizer()
        rows = rows_for(base, tokenizer, data, self.max_length, run)
        rows.sort(key=lambda row: (len(row.input_ids), row.id))
        model = self._model(base, run.seed)
        before, change = _flow(model, rows, padding_token(tokenizer), self.time, run)
        with torch.no_grad():
            for name, by in change.items():
                model.get_parameter(name).add_(by)
        run.note(loss_before=before)
        result = run.work / "result"
        save_adapter(model, result, base)
        run.publish(result)
        return load(run.folder, base)

    def _model(self, base: Base, seed: int) -> Any:
        own = {name: getattr(self, name) for name in ("start", "r", "alpha", "modules")}
        return Lora(**own).attach(base, seed).eval()


def _flow(
    model: Any, rows: list[Encoded], pad_id: int, time: float, run: Run
) -> tuple[float, dict[str, Any]]:
    """The rows' mean loss, and what the flow adds to each parameter."""
    import torch

    from deltaloom.core.errors import WorkError
    from deltaloom.engine.adaptation import weights
    from deltaloom.engine.forward import budgeted, device_of
    from deltaloom.engine.gradients import TOKENS, mean_loss
    from deltaloom.engine.meter import count_training
    from deltaloom.engine.ntk import MEMORY, gram
    from deltaloom.engine.train import collate

    device = device_of(model)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    tuned = [model.get_parameter(name) for name in names]
    budget = TOKENS["cpu" if device.type == "cpu" else "other"]
    most = max(1, MEMORY // (4 * sum(one.numel() for one in tuned)))  # rows' gradients held
    wide = budgeted([len(row.input_ids) for row in rows], budget)
    parts = [part[k : k + most] for part in wide for k in range(0, len(part), most)]
    collated = (collate([rows[i] for i in part], pad_id) for part in parts)
    batches = [{key: value.to(device) for key, value in one.items()} for one in collated]
    found = gram(model, batches, batches, lambda batch: mean_loss(model, batch)[:, None])
    kernel = torch.from_numpy(found[:, 0, :, 0])  # (n, n)
    with torch.no_grad():
        losses = torch.cat([mean_loss(model, batch) for batch in batches]).double().cpu()
    if not (torch.isfinite(losses).all() and torch.isfinite(kernel).all()):
        raise WorkError("a row's loss or gradient is not finite; look at the rows, or use float32")
    own = weights(kernel, -losses, time)
    total = [torch.zeros_like(one) for one in tuned]
    for part, batch in zip(parts, batches, strict=True):
        value = (mean_loss(model, batch) * own[part].to(device, torch.float32)).sum()
        for by, slope in zip(total, torch.autograd.grad(value, tuned), strict=True):
            by += slope
    count_training(run, model, 2 * sum(len(row.input_ids) for row in rows), "adapter")
    return float(losses.mean()), dict(zip(names, total, strict=True))
