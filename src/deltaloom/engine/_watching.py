"""What watches training: the ledger, and early stopping on a measurement passed in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import TrainerCallback

from deltaloom.core.atomic import write_json
from deltaloom.core.method import Evaluation, of_whole
from deltaloom.core.progress import progress, say
from deltaloom.core.run import Run
from deltaloom.engine.meter import count_forward, count_training

Trained = Literal["all", "adapter"]


class Ledger(TrainerCallback):
    """Metrics to the run's log, tokens to its ledger, progress to stderr."""

    def __init__(
        self,
        run: Run,
        trainable: Trained,
        total: int,
        done: int,
        earlier: int,
        beside: int = 0,
    ) -> None:
        """`beside` is how many forward passes go with each trained one, of a reference say."""
        self.run, self.earlier, self.beside = run, earlier, beside
        self.trainable: Trained = trainable
        self.total, self.done = total, done
        self.tokens = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._context = progress("tuning", self.total, self.done)
        self.advance = self._context.__enter__()
        # A run killed between a checkpoint and its ledger has not paid for the last steps yet.
        self.paid = self.run.record.setdefault("paid_tokens", {})
        self.key = f"{self.run.folder.name}/{Path(args.output_dir).name} from {self.earlier}"
        self.tokens = min(state.num_input_tokens_seen, self.paid.get(self.key, 0))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.advance(1)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if "loss" in logs:
            names = {"loss": "loss", "learning_rate": "lr", "grad_norm": "grad_norm"}
            names |= {"rewards/margins": "reward_margin", "kl": "kl"}
            values = {new: float(logs[old]) for old, new in names.items() if old in logs}
            step = self.earlier + state.global_step
            self.run.log(step=step, epoch=round(state.epoch, 6), **values)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._account(state, kwargs["model"])

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._account(state, kwargs["model"])
        self._context.__exit__(None, None, None)

    def _account(self, state: Any, model: Any) -> None:
        seen = int(state.num_input_tokens_seen)
        count_training(self.run, model, seen - self.tokens, trainable=self.trainable)
        if self.beside:
            count_forward(self.run, model, self.beside * (seen - self.tokens))
        self.tokens = self.paid[self.key] = seen
        self.run.save()


class Pause(TrainerCallback):
    """Stop after optimizer step `step`, with a checkpoint there."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= self.step:
            control.should_save = control.should_training_stop = True


class EarlyStop(TrainerCallback):
    """Measure now and then, keep the best weights, stop after `patience` without a better one."""

    def __init__(
        self,
        tokenizer: Any,
        evaluation: Evaluation,
        run: Run,
        patience: int,
        per_epoch: int,
        earlier: int,
    ) -> None:
        self.tokenizer, self.evaluation, self.run = tokenizer, evaluation, run
        self.patience, self.earlier = patience, earlier
        self.every = evaluation.every or per_epoch
        self.path = run.work / "evaluations.json"
        self.weights = run.work / "best.safetensors"
        self.history: list[dict[str, Any]] = []

    @property
    def best(self) -> dict[str, Any] | None:
        """The best evaluation so far; the earliest of equals."""
        return max(self.history, key=lambda one: (one["merit"], -one["step"]), default=None)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.path.exists():
            past = json.loads(self.path.read_text(encoding="utf-8"))
            self.history = [one for one in past if one["step"] <= state.global_step]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every:
            return
        model = kwargs["model"]
        # What a measure writes beside its value is scratch here, not part of the product.
        part = self.run.scratch("evaluation")
        found = self.evaluation.method.measure(model, self.tokenizer, self.evaluation.data, part)
        estimate = of_whole(found)
        model.train()
        merit = estimate.value if estimate.better == "higher" else -estimate.value
        before = self.best
        self.history.append({"step": state.global_step, "value": estimate.value, "merit": merit})
        step = self.earlier + state.global_step
        self.run.log(step=step, **{f"evaluation_{estimate.metric}": estimate.value})
        if before is None or merit > before["merit"]:
            _save_trainable(model, self.weights)
        write_json(self.path, self.history)
        best = self.best
        assert best is not None
        if sum(one["step"] > best["step"] for one in self.history) >= self.patience:
            say(f"no better evaluation since step {best['step']}: stopping")
            control.should_training_stop = True

    def restore(self, model: Any) -> None:
        """Put the best weights back."""
        from safetensors.torch import load_file

        if self.weights.exists():
            found = load_file(self.weights)
            with torch.no_grad():
                for name, tensor in (*model.named_parameters(), *model.named_buffers()):
                    if name in found:
                        tensor.copy_(found[name])


def _save_trainable(model: Any, path: Path) -> None:
    from safetensors.torch import save_file

    tensors = [(n, p.detach()) for n, p in model.named_parameters() if p.requires_grad]
    # Buffers of integers may say where parameters belong, as a sparse adapter's do.
    tensors += [(n, b) for n, b in model.named_buffers() if not b.dtype.is_floating_point]
    named = {name: tensor.cpu().contiguous() for name, tensor in tensors}
    temporary = path.with_name(f".{path.name}.part")
    save_file(named, temporary)
    temporary.replace(path)
