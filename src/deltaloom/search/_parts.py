"""Trials done a part at a time: tuned, paused, measured, and recorded, so that all goes on.

A part done is one small file in the run's scratch; the trial's checkpoints are beside it.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltaloom.core.atomic import write_json
from deltaloom.core.errors import WorkError
from deltaloom.core.method import Evaluation, Tuner, of_whole
from deltaloom.search._past import PastTrial, Point, Task, sizes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from deltaloom.core.base import Base
    from deltaloom.core.delta import Delta
    from deltaloom.core.examples import Examples
    from deltaloom.core.run import Run


@dataclass(frozen=True)
class Done:
    """One part of one candidate."""

    candidate: int
    part: int
    value: float | None
    """The lower the better; None when it failed."""
    flops: float
    seconds: float
    tokens: int
    """Trained since the trial began."""
    failed: str | None = None


class Parts:
    """The parts done so far, and what does one more."""

    def __init__(
        self, base: Base, rows: Examples, evaluation: Evaluation, run: Run, parts: int
    ) -> None:
        self.base, self.rows, self.evaluation = base, rows, evaluation
        self.run, self.parts = run, parts
        self.home = run.work / "parts"
        self.home.mkdir(exist_ok=True)
        self.done: list[Done] = []
        while (path := self._path(len(self.done))).exists():
            self.done.append(Done(**json.loads(path.read_text(encoding="utf-8"))))

    def describe(self, tuner: str, max_length: int | None) -> Task:
        """The task: sizes of its rows, share of distinct responses, and the untuned base's value;
        kept in the scratch.
        """
        path = self.run.work / "task.json"
        if path.exists():
            return Task.parse(json.loads(path.read_text(encoding="utf-8")), str(path))
        from deltaloom.engine.meter import matmul_parameters
        from deltaloom.tune._gradient import rows_for

        rows_for(self.base, self.base.tokenizer(), self.rows, max_length, self.run)
        notes = self.run.record["notes"]
        model = self.base.load()
        metric, untuned = self.measure(model)
        answers = {row.response or row.text or repr(row.messages) for row in self.rows}
        found = {
            **sizes(notes["rows"], notes["tokens"], notes["response_tokens"]),
            "distinct_responses": len(answers) / len(self.rows),
            "parameters": math.log2(matmul_parameters(model)),
        }
        if untuned > 0:
            found["untuned"] = math.log2(untuned)
        task = Task(
            tuner=tuner,
            metric=metric,
            name=Path(self.rows.name).name,
            features=found,
            untuned=untuned,
            trials=[],
        )
        task.write(path)
        return task

    def measure(self, model: Any) -> tuple[str, float]:
        """What is measured and its value, lower for better."""
        model.eval()
        by = self.evaluation
        part = self.run.scratch("evaluation")
        found = of_whole(by.method.measure(model, self.base.tokenizer(), by.data, part))
        return found.metric, found.value if found.better == "lower" else -found.value

    def do(self, candidate: int, part: int, tuner: Tuner) -> Done:
        """One more part, recorded."""
        import torch

        from deltaloom.engine.meter import training_cost
        from deltaloom.engine.train import Paused

        inside = self.run.nested(f"trial-{candidate}")
        inside.until = (part + 1) / self.parts
        before = max((one.tokens for one in self.done if one.candidate == candidate), default=0)
        start, value, flops, tokens, failed = time.perf_counter(), None, 0.0, before, None
        try:
            tuner.tune(self.base, self.rows, inside)
        except Paused as paused:
            tokens = paused.tokens
            cost = training_cost(paused.model, tokens - before, paused.trainable)
            flops, model = cost["flops"], paused.model
            try:
                value = self.measure(model)[1]
            except WorkError as error:
                failed = _first(error)
        except (WorkError, torch.OutOfMemoryError) as error:
            failed = _first(error)
        if value is not None and not math.isfinite(value):
            value, failed = None, f"the objective is {value}"
        seconds = time.perf_counter() - start
        if failed is not None:
            shutil.rmtree(inside.home, ignore_errors=True)
        one = Done(candidate, part, value, flops, seconds, tokens, failed)
        write_json(self._path(len(self.done)), asdict(one))
        self.done.append(one)
        return one

    def finish(self, candidate: int, tuner: Tuner) -> tuple[Delta, float]:
        """A trial trained to its end: its product as the run's, and its value."""
        from deltaloom.core.delta import load

        result = self.run.work / "result"
        shutil.rmtree(result, ignore_errors=True)
        result.mkdir()
        inside = self.run.nested(f"trial-{candidate}")
        inside.folder = result
        tuner.tune(self.base, self.rows, inside)
        self.run.publish(result)
        delta = load(self.run.folder, self.base)
        return delta, self.measure(delta.apply(self.base))[1]

    def of(self, candidate: int) -> list[Done]:
        """A candidate's parts in order."""
        return [one for one in self.done if one.candidate == candidate]

    def past(self, settings: Sequence[dict[str, Any]], begun: Sequence[int]) -> list[PastTrial]:
        """The trials of `begun` candidates as a later search reads them."""
        return [
            PastTrial(
                settings=settings[candidate],
                curve=[
                    Point(share=(one.part + 1) / self.parts, value=one.value, flops=one.flops)
                    for one in self.of(candidate)
                    if one.value is not None
                ],
                failed=self.of(candidate)[-1].failed,
            )
            for candidate in begun
        ]

    def _path(self, number: int) -> Path:
        return self.home / f"{number:05}.json"


def _first(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
