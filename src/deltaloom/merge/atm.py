"""Alternate tuning on every task with merging, so that no expert drifts far from the others.

Paper: ATM: Improving Model Merging by Alternating Tuning and Merging (Zhou et al. 2024;
arXiv 2411.03055), with the authors' code (LuckerZOfficiaL/My-Task-Vector-Playground) where the text
leaves it open; post-hoc ATM (PA-ATM) when `deltas` are given.

Formula: theta_0 is the base, or the merge of `deltas`. For k = 1..K, for every task t of `data`:
tau_t = tune(theta_{k-1}, D_t, E / K epochs, fresh optimizer) - theta_{k-1}; then
theta_k = theta_{k-1} + merge({tau_t}), the mean by default. One step of full-batch gradient descent
has tau_t = -lr * grad L_t, so an iteration of one such step is a step on the mean of the losses.

Differs: the budget is the tuner's own (E epochs of each task in all), where the authors' code fixes
one epoch an iteration; steps are rounded up to whole ones in every iteration, and one of less than
an epoch sees a part of its rows, drawn anew. The learning rate's schedule starts anew with each
optimizer. Adapters are added to the weights between iterations, in float32 where the base has 16
bits, so that small steps are not rounded away K times; the result is rounded once. The first
iteration tunes the base as it is.

Not covered: the authors' PCGrad, Gram-Schmidt, clipping and momentum on the changes; budgets that
differ by task; early stopping inside.
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, final

from pydantic import Field, model_validator

from deltaloom.core.errors import InputError
from deltaloom.core.method import Merger, Method, Sizes, Tuner, Work, of_kind
from deltaloom.core.progress import say
from deltaloom.core.registry import get
from deltaloom.core.run import Run
from deltaloom.merge.passthrough import Passthrough

if TYPE_CHECKING:
    from deltaloom.core.base import Base
    from deltaloom.core.delta import Delta
    from deltaloom.core.examples import Examples

BUDGETS = ("epochs", "steps")
"""A tuner's settings of which one is its budget."""
TAKEN_OVER = ("forward_tokens", "backward_tokens", "flops", "peak_device_bytes")
"""What the ledger takes over from the parts; their time and memory are this process's own."""


@final
class Atm(Merger):
    """Alternating tuning and merging; `data` has one set of rows per task."""

    needs = frozenset({"data"})
    uses = frozenset({"deltas"})

    tuner: str = "lora"
    """Tune method of every task, in every iteration with a fresh optimizer (ours; the authors tune
    all weights)."""
    tuning: dict[str, Any] = {}
    """Settings of the tune method; its epochs (or steps) are the whole budget of each task, divided
    over the iterations."""
    merger: str = "average"
    """Merge method of the tasks' changes in every iteration, and of several `deltas` to start from
    (the authors' default: the mean, at scale 1). `ties`, `breadcrumbs` and `dare_linear` are among
    the authors' choices."""
    merging: dict[str, Any] = {}
    """Settings of the merge method, such as `scale`."""
    iterations: Annotated[int | None, Field(ge=1)] = None
    """Rounds K of tuning and merging. None makes each an epoch at most, as the authors' code does,
    or ten of a tuner that counts steps (theirs too); 1 is one merge of experts tuned apart."""

    @model_validator(mode="after")
    def _parts_fit(self) -> Atm:
        self._tuners()
        if "deltas" not in self._merger().needs:
            raise ValueError(
                f"merger = {self.merger!r} does not merge deltas; choose one that does"
            )
        return self

    def work(self, sizes: Sizes) -> Work:
        """The tuner's tokens over all tasks; on the disk, two iterates beside the result."""
        tuning, merging = self._tuner().work(sizes), self._merger().work(sizes)
        return replace(
            tuning,
            memory_bytes=max(tuning.memory_bytes, merging.memory_bytes),
            disk_bytes=tuning.disk_bytes + 3 * sizes.weight_bytes,
        )

    def merge(
        self, base: Base, deltas: list[Delta], run: Run, *, data: Sequence[Examples] = ()
    ) -> Delta:
        """Tune and merge in turns; writes a model folder to `run.folder`, a change over `base`.

        With `deltas` the first iteration starts from them: one as it is, several merged. Raises
        InputError for no data and as the tuner and the merger do.
        """
        from deltaloom.core.delta import load
        from deltaloom.core.deltas.dense import Dense

        if not data:
            raise InputError("merge atm: nothing to tune on: give data=, one set of rows per task")
        tuners, merger = self._tuners(), self._merger()
        given = data if "data" in merger.needs | merger.uses else ()
        done = run.record["notes"].get("iterations", 0)
        if done:
            _clear(run, done)  # what an interruption left
        for k, tuner in enumerate(tuners[done:], done + 1):
            say(f"iteration {k} of {len(tuners)}")
            start = _at(base, _iterate(run, k - 1)) if k > 1 else self._start(base, deltas, run)
            parts = self._tuned(k, tuner, start, data, run)
            _merged(k, merger, start, [load(part, start) for part in parts], given, run)
            _account(k, parts, data, run)
            _clear(run, k)
        result = Dense.from_model(_iterate(run, len(tuners)), base)
        return Passthrough().merge(base, [result], run)

    def _tuner(self) -> Tuner:
        return of_kind(get("tune", self.tuner).make(self.tuning), Tuner)

    def _merger(self) -> Merger:
        return of_kind(get("merge", self.merger).make(self.merging), Merger)

    def _tuners(self) -> list[Tuner]:
        """The tuner of each iteration, with its part of the budget."""
        tuner = self._tuner()
        key = next((k for k in BUDGETS if getattr(tuner, k, None) is not None), None)
        if key is None:
            raise InputError(f"tuner = {self.tuner!r} has no epochs or steps to divide")
        total = getattr(tuner, key)
        if key == "epochs":
            count = self.iterations or math.ceil(total)
            shares: list[float] = [total / count] * count
        else:
            count = self.iterations or min(10, total)
            ends = [total * k // count for k in range(count + 1)]
            shares = [end - start for start, end in pairwise(ends)]
        if min(shares) <= 0:
            raise InputError(f"tuning.{key} = {total} is less than one for {count} iterations")
        return [tuner.model_copy(update={key: share}) for share in shares]

    def _start(self, base: Base, deltas: list[Delta], run: Run) -> Base:
        """The base, or with deltas the model that they make of it."""
        if not deltas:
            return base
        merger = self._merger() if len(deltas) > 1 else Passthrough()
        if "data" in merger.needs:
            raise InputError(
                f"merge atm: {self.merger} needs data to merge deltas= with; do that in a step of "
                "its own and start from what it makes"
            )
        return _merged(0, merger, base, deltas, (), run)

    def _tuned(
        self, k: int, tuner: Tuner, start: Base, data: Sequence[Examples], run: Run
    ) -> list[Path]:
        """The folders of the tasks' changes over `start`, those that are there not made again."""
        folders = []
        # One iteration has the bytes of experts tuned at this run's seed.
        seed = run.seed if k == 1 else random.Random(f"atm {run.seed} {k}").getrandbits(31)
        for number, rows in enumerate(data):
            folders.append(run.work / f"tuned-{k}-{number}")
            with _open(folders[-1], tuner, seed) as part:
                if not part.done:
                    say(f"iteration {k}: {self.tuner} on {Path(rows.name).stem}")
                    tuner.tune(start, rows, part)
                    part.finish()
        return folders


def _merged(
    k: int, merger: Merger, start: Base, deltas: list[Delta], data: Sequence[Examples], run: Run
) -> Base:
    """The model that `merger` makes of `deltas` over `start`: iterate `k`."""
    from deltaloom.core.delta import load
    from deltaloom.core.deltas.dense import Dense

    made, goal = _made(run, k), _iterate(run, k)
    if (goal / "run.json").exists() and Run.read(goal)["status"] == "done":
        return _at(start, goal)
    with _open(made, merger, run.seed) as part:
        if not part.done:
            _in_float32(merger, start).merge(start, deltas, part, data=data)
            part.finish()
    change = load(made, start)
    if isinstance(change, Dense) and change.folder is not None:
        os.replace(made, goal)
        return _at(start, goal)
    with _open(goal, Passthrough(), run.seed) as part:
        if not part.done:  # what was made is a change and no model yet
            _in_float32(Passthrough(), start).merge(start, [change], part)
            part.finish()
    return _at(start, goal)


def _account(k: int, parts: list[Path], data: Sequence[Examples], run: Run) -> None:
    """Take over the parts' losses and costs, once: the note is saved with the costs."""
    run.rewind(k - 1)
    made = [path for path in (_made(run, k), _iterate(run, k)) if path.exists()]
    for folder in (*parts, *made):
        cost = Run.read(folder)["cost"]
        run.spend(**{key: cost[key] for key in TAKEN_OVER})
    for folder, rows in zip(parts, data, strict=True):
        loss = _last_loss(folder / "metrics.jsonl")
        if loss is not None:
            run.log(step=k, task=Path(rows.name).stem, loss=loss)
    run.note(iterations=k)
    run.save()


def _made(run: Run, k: int) -> Path:
    return run.work / f"merged-{k}"


def _iterate(run: Run, k: int) -> Path:
    return run.work / f"iterate-{k}"


def _at(base: Base, folder: Path) -> Base:
    return base.model_copy(update={"model": str(folder), "revision": None})


def _open(folder: Path, method: Method, seed: int) -> Run:
    """A part as a run of its own, so that its checkpoints, metrics and record are its alone."""
    return Run.open(folder, {method.verb: method.model_dump(mode="json")}, {}, seed)


def _in_float32(merger: Merger, start: Base) -> Merger:
    """The merger, writing float32 where the weights have 16 bits and the settings say no type."""
    from deltaloom.core.tensors import TensorFolder

    with TensorFolder(start.folder) as tensors:
        narrow = any(entry.dtype in ("F16", "BF16") for entry in tensors.values())
    free = "dtype" in type(merger).model_fields and getattr(merger, "dtype", None) is None
    return merger.model_copy(update={"dtype": "float32"}) if narrow and free else merger


def _clear(run: Run, k: int) -> None:
    """Remove what iteration `k` was made from."""
    for folder in (*run.work.glob(f"tuned-{k}-*"), _made(run, k), _iterate(run, k - 1)):
        shutil.rmtree(folder, ignore_errors=True)


def _last_loss(path: Path) -> float | None:
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    found = [loss for line in lines if (loss := json.loads(line).get("loss")) is not None]
    return found[-1] if found else None
