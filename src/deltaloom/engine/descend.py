"""Tuning without gradients: steps along random directions, logged so that the log is the run.

After each step one line with its scalars goes to `run.work / steps.jsonl`. A run that was
interrupted replays these on the start (no forward pass) and goes on; a step that was not logged is
made again. There are no checkpoints of weights, and keeping the best evaluation is keeping the
steps up to it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deltaloom.core.atomic import write_text
from deltaloom.core.deltas.descent import Descent, Rule, Scalars, replay
from deltaloom.core.deltas.directions import place
from deltaloom.core.deltas.trace import Form, Steps
from deltaloom.core.errors import WorkError
from deltaloom.core.method import Evaluation, of_whole
from deltaloom.core.progress import progress, say
from deltaloom.core.run import Run
from deltaloom.core.spec import canonical
from deltaloom.engine.meter import count_forward
from deltaloom.engine.perturb import Directed, Moved, Perturbed

Objective = Callable[[Directed, Sequence[int]], tuple[float, float, int]]
"""Values, lower being better, of the rows of these numbers with parameters moved by plus and by
minus eps z, and the tokens put through the model for them."""


@dataclass(frozen=True)
class DescendSettings:
    """What `descend` needs to know; the tuner's fields say what each means and where it is from."""

    steps: int
    batch_size: int
    lr: float
    perturbations: int = 1
    schedule: str = "constant"
    warmup: float = 0.0
    patience: int = 3

    def lr_at(self, step: int) -> float:
        """Learning rate of a step, from 0."""
        rising = int(self.warmup * self.steps)
        if step < rising:
            return self.lr * (step + 1) / rising
        done = (step - rising) / max(1, self.steps - rising)
        share = {
            "constant": 1.0,
            "linear": 1.0 - done,
            "cosine": 0.5 * (1.0 + math.cos(math.pi * done)),
        }[self.schedule]
        return self.lr * share


def descend(
    model: Any,
    names: Sequence[str],
    rule: Rule,
    rows: int,
    objective: Objective,
    settings: DescendSettings,
    run: Run,
    *,
    tokenizer: Any = None,
    evaluation: Evaluation | None = None,
) -> Steps:
    """Tune the parameters `names` of `model` in place on `rows` rows; resumes what was begun.

    The steps that are returned end with the best evaluation, if there is one; the model then has
    taken more of them. Raises WorkError when the objective stops being finite.
    """
    parameters = dict(model.named_parameters())
    forms = {name: Form.of(parameters[name]) for name in names}
    log = _Log(run, settings, rows, evaluation)
    tuned = {name: parameters[name] for name in names}
    descent = _resumed(rule, tuned, log.found)
    log.rewind()
    with (Moved if rule.direction == "gaussian" else Perturbed)(model, names, rule) as directed:
        stepper = _Stepper(directed, descent, objective, settings, rows, run.seed)
        judge = _Judge(log, model, tokenizer, evaluation)
        stop = judge.after(len(log.found))
        with progress("tuning", settings.steps, len(log.found)) as advance:
            for number in range(len(log.found), settings.steps):
                if stop:
                    break
                found, value = stepper.step(number)
                log.add(found, value)
                log.tokens += stepper.tokens
                if len(log.found) % log.window == 0:
                    log.account(model)
                advance(1)
                stop = judge.after(number + 1)
    log.account(model)
    best = log.best
    kept = log.found if best is None else log.found[: best["step"]]
    if best is not None:
        run.note(best_evaluation=best)
    return Steps(rule, forms, str(model.dtype).removeprefix("torch."), kept)


def _resumed(rule: Rule, tuned: Mapping[str, Any], found: Sequence[Scalars]) -> Descent:
    """The steps so far made again on the start."""
    if found:
        say(f"replaying {len(found)} steps")
    remembered = {name: replay(rule, name, one.data, found) for name, one in tuned.items()}
    return Descent(rule, {name: one for name, one in remembered.items() if one is not None})


@dataclass
class _Stepper:
    """Makes one step."""

    directed: Directed
    descent: Descent
    objective: Objective
    settings: DescendSettings
    rows: int
    seed: int
    tokens: int = 0
    """Of the last step."""

    def step(self, number: int) -> tuple[Scalars, float]:
        """Measure and move; returns what was measured and the objective's mean."""
        chosen, eps = self._chosen(number), self.directed.rule.eps
        values, total, self.tokens = [], 0.0, 0
        for k in range(self.settings.perturbations):
            self.directed.choose(number, k)
            plus, minus, tokens = self.objective(self.directed, chosen)
            if not (math.isfinite(plus) and math.isfinite(minus)):
                raise WorkError(
                    f"the objective is {plus} and {minus} at step {number + 1}; try a smaller lr "
                    f"(it is {self.settings.lr:g}) or eps (it is {eps:g})"
                )
            values.append(_single((plus - minus) / (2 * eps)))
            total += (plus + minus) / 2
            self.tokens += tokens
        if number == 0 and isinstance(self.directed, Perturbed):
            self.directed.check()
        # Rounded before use, because the trace keeps them in float32.
        found = Scalars(_single(self.settings.lr_at(number)), tuple(values))
        with torch.no_grad():
            for name, parameter in self.directed.parameters.items():
                drawn = [self.directed.direction(name, k) for k in range(len(values))]
                self.descent.step(number, name, parameter.data, found, drawn)
        return found, total / len(values)

    def _chosen(self, number: int) -> list[int]:
        """The rows of a step: every epoch has its own order."""
        size = min(self.settings.batch_size, self.rows)
        epoch, at = divmod(number, math.ceil(self.rows / size))
        generator = torch.Generator().manual_seed(place(self.seed, "order", epoch))
        order = torch.randperm(self.rows, generator=generator)
        return order[at * size : (at + 1) * size].tolist()


class _Log:
    """The run's steps and evaluations, on disk as they come."""

    def __init__(
        self, run: Run, settings: DescendSettings, rows: int, evaluation: Evaluation | None
    ) -> None:
        self.run, self.settings = run, settings
        self.epoch = math.ceil(rows / min(settings.batch_size, rows))
        """Steps in one."""
        self.window = max(1, settings.steps // 100)
        self.every = (evaluation.every or self.epoch) if evaluation else None
        self.tokens = 0
        self.path = run.work / "steps.jsonl"
        self.judged = run.work / "evaluations.jsonl"
        lines = _whole_lines(self.path)
        self.found = [Scalars(one["lr"], tuple(one["scalars"])) for one in lines]
        self.values: list[float] = [one["value"] for one in lines]
        past = _whole_lines(self.judged)
        self.evaluations = [one for one in past if one["step"] <= len(self.found)]

    @property
    def best(self) -> dict[str, Any] | None:
        """The best evaluation so far; the earliest of equals."""
        return max(self.evaluations, key=lambda one: (one["merit"], -one["step"]), default=None)

    def rewind(self) -> None:
        """Write the metrics of the steps so far again, whatever an interruption left of them."""
        self.run.rewind(0)
        judged = {one["step"]: one for one in self.evaluations}
        for step in range(1, len(self.found) + 1):
            self._metrics(step)
            if step in judged:
                self._evaluated(judged[step])

    def add(self, found: Scalars, value: float) -> None:
        """Keep a step; it is made once this returns."""
        self.found.append(found)
        self.values.append(value)
        line = {"lr": found.lr, "scalars": list(found.values), "value": value}
        _append(self.path, line)
        self._metrics(len(self.found))

    def judge(self, evaluation: dict[str, Any]) -> None:
        """Keep an evaluation."""
        self.evaluations.append(evaluation)
        _append(self.judged, evaluation)
        self._evaluated(evaluation)

    def account(self, model: Any) -> None:
        """Enter the forward passes since the last time in the ledger."""
        if self.tokens:
            count_forward(self.run, model, self.tokens)
            self.tokens = 0
            self.run.save()

    def _metrics(self, step: int) -> None:
        if step % self.window and step != self.settings.steps:
            return
        first = (step - 1) // self.window * self.window
        found = self.found[step - 1]
        self.run.log(
            step=step,
            epoch=round(step / self.epoch, 6),
            loss=math.fsum(self.values[first:step]) / (step - first),
            lr=found.lr,
            projected_gradient=math.fsum(found.values) / len(found.values),
        )

    def _evaluated(self, one: dict[str, Any]) -> None:
        self.run.log(step=one["step"], **{f"evaluation_{one['metric']}": one["value"]})


@dataclass
class _Judge:
    """Evaluates now and then, and says when to stop."""

    log: _Log
    model: Any
    tokenizer: Any
    evaluation: Evaluation | None

    def after(self, step: int) -> bool:
        """Evaluate if it is time; whether no better one came for `patience` evaluations."""
        log, asked = self.log, self.evaluation
        if asked is None or log.every is None:
            return False
        due = step > 0 and step % log.every == 0
        if due and step not in {one["step"] for one in log.evaluations}:
            part = log.run.scratch("evaluation")
            found = asked.method.measure(self.model, self.tokenizer, asked.data, part)
            estimate = of_whole(found)
            merit = estimate.value if estimate.better == "higher" else -estimate.value
            about = {"metric": estimate.metric, "value": estimate.value, "merit": merit}
            log.judge({"step": step, **about})
        best = log.best
        worse = [one for one in log.evaluations if best and one["step"] > best["step"]]
        stop = len(worse) >= log.settings.patience
        if stop and best:
            say(f"no better evaluation since step {best['step']}: stopping")
        return stop


def _single(value: float) -> float:
    """Rounded to float32."""
    return float(torch.tensor(value, dtype=torch.float32))


def _append(path: Path, line: dict[str, Any]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(canonical(line) + "\n")


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; what an interruption cut short is removed from the file."""
    if not path.exists():
        return []
    *lines, rest = path.read_text(encoding="utf-8", errors="replace").split("\n")
    if rest:
        write_text(path, "".join(line + "\n" for line in lines))
    return [json.loads(line) for line in lines]
