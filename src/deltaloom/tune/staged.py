"""One model for many tasks in three stages: unlike tasks left out, large tasks first, then all.

Paper: Qu et al. 2024, "Deploying Multi-task Online Server with Large Language Model" (arXiv
2411.03644; COLING 2025 industry track). No code was released.

1. Filter: tasks whose mean similarity with all that are kept, themselves too, is below `threshold`
are left out, the least fitting first.
2. High-resource: the kept tasks with at least `high` rows, task k with share ~ n_k^(1/T), T the
first of `temperatures`. 3. All kept tasks, T the second. A task is what has one `source`.

Differs: the paper's thresholds, temperatures and similarity are not in what could be read of it;
those here are ours. Tuning is LoRA. The budget of `epochs` passes over the kept rows is divided
between the stages, so that it compares with plain mixing (`filter=none high_share=0
temperatures=[1,1]`) at equal rows. Shares are exact over a stage; rows of small tasks repeat as
the temperature asks, up to `repeats`, and the run's notes tell how often.

With `evaluate`, every task of its data (by `source`) is measured before and after each stage:
`stages.json` in the result, and the report's table.

Not covered: domain-specific continued pretraining, the paper's stage before these; stopping single
tasks early inside a stage; tuning the tasks left out (`run.json` names them: give each its own
adapter).
"""

from __future__ import annotations

import json
import random
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, final

from pydantic import Field

from deltaloom.core.atomic import write_json
from deltaloom.core.delta import Delta, load
from deltaloom.core.errors import InputError
from deltaloom.core.method import Evaluation, Sizes, Tuner, Work
from deltaloom.core.progress import say
from deltaloom.tune._gradient import GradientSettings
from deltaloom.tune.lora import Lora, save_adapter

if TYPE_CHECKING:
    from deltaloom.core.base import Base
    from deltaloom.core.examples import Examples
    from deltaloom.core.run import Run
    from deltaloom.tune._stages import Stage

PROBED = 64
"""Rows of a task that its similarity is measured on, at most (ours)."""
PROBE_TASKS = 8
"""Tasks that `plan` expects."""


@final
class Staged(GradientSettings, Tuner):
    """Three-stage multi-task tuning; the result is a PEFT adapter folder with `stages.json`."""

    filter: Literal["gradient", "transfer", "none"] = "gradient"
    """Similarity of tasks: cosine of their mean gradients, or the part of a task's own gain that
    tuning on another gives; `none` keeps all (ours; the paper's is not known)."""
    threshold: Annotated[float, Field(ge=-1, le=1)] = 0.0
    """Mean similarity with the kept tasks, itself as 1, below which a task is left out. With
    gradients 0 is where a step for all tasks together makes this one worse (ours; the paper's is
    not known)."""
    probe_steps: Annotated[int, Field(ge=0)] = 20
    """Steps before similarity is measured: on all tasks together for gradients (which at the base
    itself tell the format rather than the task), on each task for transfer (ours)."""
    high: Annotated[int | None, Field(ge=1)] = None
    """Rows from which a task is high-resource; None takes the mean over tasks (ours)."""
    high_share: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Part of the budget that goes to the high-resource tasks first (ours); 0 leaves stage two
    out."""
    temperatures: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = (1.0, 2.0)
    """Sampling temperatures of stages two and three: 1 is proportional to rows, larger is more even
    (ours; T5 finds 2 best with a large cap)."""
    repeats: Annotated[float, Field(ge=1)] = 4.0
    """How often a row may be seen in a stage, at most, for each time that proportional mixing would
    see it (ours)."""
    final_lr: Annotated[float, Field(gt=0)] = 1.0
    """Learning rate of stage three as a part of `lr` (ours)."""
    lr: Annotated[float, Field(gt=0)] = 2e-4
    """Peak learning rate (QLoRA, table 9: 2e-4)."""
    r: Annotated[int, Field(ge=1)] = 8
    """LoRA's rank (PEFT's default: 8)."""
    alpha: Annotated[float, Field(gt=0)] = 16.0
    """LoRA's scaling is alpha / r (QLoRA: 16)."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """LoRA's dropout (PEFT's default: 0)."""
    modules: list[str] | None = None
    """Names of the modules that LoRA adapts, by their last part; None adapts every linear module
    but the output head."""

    def work(self, sizes: Sizes) -> Work:
        """The inner tuning's, and the probe of eight tasks."""
        inner = self._lora().work(sizes)
        if self.filter == "none":
            return inner
        rows = (
            self.probe_steps * self.batch_size * (PROBE_TASKS if self.filter == "transfer" else 1)
        )
        probed = min(sizes.rows, PROBED * PROBE_TASKS)
        tokens = (rows + probed) * sizes.row_tokens
        return replace(inner, adapter_tokens=inner.adapter_tokens + tokens)

    def tune(
        self, base: Base, data: Examples, run: Run, *, evaluation: Evaluation | None = None
    ) -> Delta:
        """Filter and tune `base`; writes an adapter folder and `stages.json` to `run.folder`.

        Raises InputError for a single task, and for `evaluate.every`: tasks are measured after
        stages.
        """
        from deltaloom.tune._stages import Held, train_stages

        if evaluation is not None and evaluation.every is not None:
            raise InputError("tune staged measures after each stage; leave out evaluate.every")
        tasks = data.sources()
        if len(tasks) < 2:
            raise InputError(
                f"{data.name}: has one task (source) only; use tune lora, or give rows a 'source'"
            )
        lora = self._lora()
        similarity, kept = self._kept(base, data, run)
        left_out = sorted(tasks.keys() - kept)
        if left_out:
            say(f"left out as unlike the other tasks: {', '.join(left_out)}")
        stages = self._stages(data, kept, run)
        model = lora.attach(base, run.seed)
        held = Held(base, evaluation, run)
        found = train_stages(model, base, lora, stages, held, run)
        run.note(tasks=dict(tasks), left_out=left_out, stages=[stage.told() for stage in stages])
        result = run.work / "result"
        save_adapter(model, result, base)
        record = {"tasks": dict(tasks), "left_out": left_out, "similarity": similarity}
        write_json(result / "stages.json", {**record, "stages": found})
        run.publish(result)
        return load(run.folder, base)

    def _lora(self) -> Lora:
        names = Lora.model_fields.keys() & type(self).model_fields.keys()
        return Lora(**{name: getattr(self, name) for name in names})

    def _kept(
        self, base: Base, data: Examples, run: Run
    ) -> tuple[dict[str, dict[str, float]] | None, list[str]]:
        """Similarities, and the tasks that stay; measured once."""
        if self.filter == "none":
            return None, sorted(data.sources())
        from deltaloom.core.encoding import encode
        from deltaloom.core.run import Run as Part
        from deltaloom.engine.forward import padding_token
        from deltaloom.tune import _kinship

        path = run.work / "similarity.json"
        if not path.exists():
            lora = self._lora()
            longest = min(self.max_length or base.max_length, base.max_length)
            tasks = {
                name: encode(rows, base.tokenizer(), longest)
                for name, rows in _some(data, run.seed).items()
            }
            settings = lora.train_settings(
                lora.lr, epochs=1, trainable="adapter", save_steps=max(1, self.probe_steps)
            )
            with Part.open(run.work / "probe", {"probe": self.filter}, {}, run.seed) as part:
                how = {"gradient": _kinship.by_gradient, "transfer": _kinship.by_transfer}
                model = lora.attach(base, run.seed)
                pad = padding_token(base.tokenizer())
                found = how[self.filter](model, tasks, pad, settings, self.probe_steps, part)
            cost = part.record["cost"]
            run.spend(**{k: cost[k] for k in ("forward_tokens", "backward_tokens", "flops")})
            run.save()
            write_json(path, found)
        similarity = json.loads(path.read_text(encoding="utf-8"))
        return similarity, _kinship.kept(similarity, self.threshold)

    def _stages(self, data: Examples, kept: list[str], run: Run) -> list[Stage]:
        """Rows and learning rate of each stage."""
        from deltaloom.tune._stages import Stage, drawn

        rows = type(data)((row for row in data if row.source in kept), data.name)
        sizes = rows.sources()
        floor = self.high or sum(sizes.values()) / len(sizes)
        large = type(data)((row for row in rows if sizes[row.source] >= floor), data.name)
        if not len(large):
            raise InputError(
                f"high = {self.high}: no task that is kept has so many rows (the largest has "
                f"{max(sizes.values())}); choose a smaller number"
            )
        budget = self.epochs * len(rows)
        first = round(self.high_share * budget)
        parts: list[tuple[str, Any, float, float, float]] = [
            ("high-resource", large, first, self.temperatures[0], self.lr),
            ("all", rows, budget - first, self.temperatures[1], self.lr * self.final_lr),
        ]
        return [
            Stage(name, drawn(own, round(count), heat, self.repeats, run.seed + number), lr)
            for number, (name, own, count, heat, lr) in enumerate(parts)
            if count >= 1
        ]


def _some(data: Examples, seed: int) -> dict[str, Examples]:
    """At most `PROBED` random rows of each task, tasks by name."""
    numbers: dict[str, list[int]] = {}
    for number, row in enumerate(data):
        numbers.setdefault(row.source, []).append(number)
    found = {}
    for name in sorted(numbers):
        own = numbers[name]
        random.Random(f"probed {seed} {name}").shuffle(own)
        found[name] = data.take(own[:PROBED])
    return found
