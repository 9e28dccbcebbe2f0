"""Meta-training of a language model: tasks drawn, gradients through adaptation, whole checkpoints.

A row's output, for the closed form, is its mean cross-entropy, and its target is zero.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call  # pyright: ignore[reportPrivateImportUsage]
from torch.nn.attention import SDPBackend, sdpa_kernel

from deltaloom.core.atomic import new_file
from deltaloom.core.encoding import Encoded
from deltaloom.core.errors import WorkError
from deltaloom.core.progress import progress
from deltaloom.core.run import Run
from deltaloom.engine import adaptation
from deltaloom.engine.adaptation import Function, Outer, Parameters, Tangent, moved
from deltaloom.engine.forward import device_of
from deltaloom.engine.gradients import mean_loss, per_example, summed_loss
from deltaloom.engine.meter import count_training
from deltaloom.engine.train import collate

STATE = "state.safetensors"


@dataclass(frozen=True)
class MetaSettings:
    """What meta-training needs to know; `tune meta`'s fields say what each means."""

    inner: str
    order: str
    steps: int
    tasks: int
    shots: int
    queries: int
    time: float
    inner_lr: float
    inner_steps: int
    strength: float
    lr: float
    clip: float
    save_steps: int | None


class Drawn(NamedTuple):
    """Rows of one task: to adapt to, and to be judged by."""

    support: list[Encoded]
    query: list[Encoded]


def drawn(
    tasks: Sequence[Sequence[Encoded]], settings: MetaSettings, seed: int, step: int
) -> list[Drawn]:
    """The tasks of a step with rows of each; a small task's are divided in the same proportion."""
    dice = random.Random(f"meta {seed} {step}")
    found = []
    for rows in dice.sample(tasks, min(settings.tasks, len(tasks))):
        wanted = settings.shots + settings.queries
        count = min(wanted, len(rows))
        shots = min(max(1, round(count * settings.shots / wanted)), count - 1)
        own = dice.sample(rows, count)
        found.append(Drawn(own[:shots], own[shots:]))
    return found


class Learner:
    """A model whose parameters `names` are learned, as functions of those parameters."""

    def __init__(self, model: Any, names: Sequence[str], pad_id: int) -> None:
        self.model, self.names, self.pad_id = model.eval(), list(names), pad_id
        self.tokens = 0
        """Put through the model, forward and backward, since they were last counted. A second
        derivative counts as one more pass."""

    @property
    def parameters(self) -> dict[str, Tensor]:
        """Those that are learned, as they are now."""
        return {name: self.model.get_parameter(name).detach() for name in self.names}

    def loss(self, rows: Sequence[Encoded]) -> Function:
        """Mean cross-entropy of all response tokens of `rows`."""
        batch = self._batch(rows)
        learned = max(1, int((batch["labels"][:, 1:] != -100).sum()))
        size = sum(len(row.input_ids) for row in rows)

        def loss(parameters: Parameters) -> Tensor:
            self.tokens += size
            return summed_loss(_With(self.model, parameters), batch).sum() / learned

        return loss

    def tangent(self, rows: Sequence[Encoded]) -> Tangent:
        """The rows' mean cross-entropies and their slopes, from one backward pass a batch."""
        values: list[Tensor] = []

        def loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
            values.append(mean_loss(model, batch))
            return values[-1]

        self.tokens += sum(len(row.input_ids) for row in rows)
        found = [*per_example(self.model, rows, self.pad_id, names=self.names, loss=loss)]
        order = torch.tensor([number for numbers, _ in found for number in numbers]).argsort()
        slopes = torch.cat([part for _, part in found])
        return Tangent(torch.cat(values).detach()[order], slopes[order.to(slopes.device)])

    def outer(self, task: Drawn, settings: MetaSettings) -> Outer:
        """Loss after adaptation to a task and its gradient, as `settings.inner` has it."""
        lr, steps = settings.inner_lr, settings.inner_steps
        whole = settings.order == "whole"
        rows, query = task.support, self.loss(task.query)
        if settings.inner == "kernel":
            return self._after_closed_form(task, query, settings.time, whole)
        if settings.inner == "gradient":
            support = self.loss(rows)
            with _twice(whole):
                return adaptation.after_descent(
                    support, query, self.parameters, lr, steps, first_order=not whole
                )
        every = self.loss([*rows, *task.query])
        if settings.inner == "reptile":
            return adaptation.towards_descent(every, self.parameters, lr, steps)
        with _twice(True):
            return adaptation.steepness(every, self.parameters, settings.strength)

    def _after_closed_form(self, task: Drawn, query: Function, time: float, whole: bool) -> Outer:
        at = self.tangent(task.support)
        goals = torch.zeros_like(at.values)
        rows = [self.loss([row]) for row in task.support] if whole else ()
        with _twice(whole):
            return adaptation.after_closed_form(
                lambda p, by: query(moved(p, by)), self.parameters, at, goals, time, rows
            )

    def _batch(self, rows: Sequence[Encoded]) -> dict[str, Tensor]:
        device = device_of(self.model)
        return {key: value.to(device) for key, value in collate([*rows], self.pad_id).items()}


class _With:
    """A model called with other parameters than its own."""

    def __init__(self, model: Any, parameters: Parameters) -> None:
        self._model, self._parameters = model, dict(parameters)

    def __call__(self, **named: Any) -> Any:
        return functional_call(self._model, self._parameters, (), named)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def _twice(needed: bool) -> AbstractContextManager[Any]:
    """Attention that can be differentiated twice, where that is needed."""
    return sdpa_kernel(SDPBackend.MATH) if needed else nullcontext()


def learn(
    learner: Learner,
    tasks: Sequence[Sequence[Encoded]],
    settings: MetaSettings,
    run: Run,
    kind: Literal["all", "adapter"],
) -> None:
    """Meta-train the learner's parameters in place; takes up what an earlier process saved.

    `kind` is what `count_training` calls what is trained. Raises WorkError for a loss that is not
    finite.
    """
    trained = {name: learner.model.get_parameter(name) for name in learner.names}
    optimizer = torch.optim.Adam(trained.values(), lr=settings.lr)
    every = settings.save_steps or math.ceil(settings.steps / 10)
    # A logged loss is a mean since the last one: windows must not reach over a checkpoint.
    window = max(n for n in range(1, max(1, settings.steps // 100) + 1) if every % n == 0)
    path = run.work / STATE
    done = _resume(path, trained, optimizer)
    run.rewind(done)
    losses: list[float] = []
    with progress("meta-training", settings.steps, done) as advance:
        for step in range(done, settings.steps):
            losses.append(_step(learner, drawn(tasks, settings, run.seed, step), settings))
            _check(losses[-1], step, settings)
            torch.nn.utils.clip_grad_norm_(trained.values(), settings.clip or math.inf)
            optimizer.step()
            last = step + 1 == settings.steps
            if (step + 1) % window == 0 or last:
                run.log(step=step + 1, loss=math.fsum(losses) / len(losses), lr=settings.lr)
                losses.clear()
            if (step + 1) % every == 0 or last:
                count_training(run, learner.model, learner.tokens, kind)
                learner.tokens = 0
                _save(path, trained, optimizer, step + 1)
                run.save()
            advance(1)


def _step(learner: Learner, tasks: list[Drawn], settings: MetaSettings) -> float:
    """Put the mean gradient over the tasks where the optimizer looks for it."""
    found = [learner.outer(task, settings) for task in tasks]
    for name in learner.names:
        parameter = learner.model.get_parameter(name)
        total = sum((one.gradient[name] for one in found), torch.zeros_like(parameter))
        parameter.grad = total / len(found)
    return math.fsum(one.loss for one in found) / len(found)


def _check(loss: float, step: int, settings: MetaSettings) -> None:
    if not math.isfinite(loss):
        rates = f"lr (it is {settings.lr:g})"
        if settings.inner == "energy":
            rates += f" or strength (it is {settings.strength:g})"
        elif settings.inner != "kernel":
            rates += f" or inner_lr (it is {settings.inner_lr:g})"
        raise WorkError(
            f"the loss after adaptation is {loss} at step {step + 1}; try a smaller {rates}"
        )


def _save(
    path: Path, trained: dict[str, Any], optimizer: torch.optim.Optimizer, steps: int
) -> None:
    from safetensors.torch import save_file

    found = {}
    for name, parameter in trained.items():
        state = optimizer.state[parameter]
        found[f"at {name}"] = parameter.detach()
        found |= {f"{key} {name}": state[key] for key in ("exp_avg", "exp_avg_sq")}
    tensors = {name: tensor.cpu().contiguous() for name, tensor in found.items()}
    with new_file(path) as temporary:
        save_file(tensors, temporary, metadata={"steps": str(steps)})


def _resume(path: Path, trained: dict[str, Any], optimizer: torch.optim.Optimizer) -> int:
    """Steps that were done, their outcome put where it belongs."""
    from safetensors import safe_open

    if not path.exists():
        return 0
    with safe_open(path, "pt") as file:
        steps = int((file.metadata() or {})["steps"])
        for name, parameter in trained.items():
            with torch.no_grad():
                parameter.copy_(file.get_tensor(f"at {name}"))
            state = {k: file.get_tensor(f"{k} {name}") for k in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {
                "step": torch.tensor(float(steps)),
                **{key: value.to(parameter) for key, value in state.items()},
            }
    return steps
