"""Stages of multi-task tuning, one after the other, and what every task has gained after each."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from deltaloom.core.atomic import new_file, write_json
from deltaloom.core.encoding import encode
from deltaloom.core.estimate import Estimate, compare
from deltaloom.core.method import of_whole
from deltaloom.core.progress import say
from deltaloom.core.source_weights import SourceWeights, epoch
from deltaloom.engine.forward import padding_token
from deltaloom.engine.train import fit

if TYPE_CHECKING:
    from deltaloom.core.base import Base
    from deltaloom.core.examples import Examples
    from deltaloom.core.method import Evaluation
    from deltaloom.core.run import Run
    from deltaloom.tune.lora import Lora


@dataclass(frozen=True)
class Drawn:
    """The rows of a stage, and how often the rows of each task are in it."""

    rows: Examples
    times: dict[str, float]

    def summary(self) -> str:
        """One line, with the task whose rows are seen most often."""
        most = max(self.times, key=lambda name: self.times[name])
        return (
            f"{len(self.rows)} rows of {len(self.times)} tasks; each row of {most!r} is seen "
            f"{self.times[most]:g} times"
        )


@dataclass(frozen=True)
class Stage:
    """One phase of training."""

    name: str
    drawn: Drawn
    lr: float

    def told(self) -> dict[str, Any]:
        """What the run's notes say of it."""
        return {
            "name": self.name,
            "rows": dict(sorted(self.drawn.rows.sources().items())),
            "times_each_row": self.drawn.times,
        }


def drawn(data: Examples, count: int, temperature: float, repeats: float, seed: int) -> Drawn:
    """`count` rows, tasks in shares n_k^(1 / temperature), exactly.

    A row is seen at most `repeats` times as often as in proportional mixing; what a task is short
    of goes to the others.
    """
    sizes = Counter(row.source for row in data)
    weights = {name: size ** (1 / temperature) for name, size in sizes.items()}
    most = max(1.0, repeats * count / len(data))
    wanted = SourceWeights(weights, size=count, repeats=most, where="the stage's shares")
    found = epoch(data, wanted.within(sizes), seed)
    times = {name: round(n / sizes[name], 3) for name, n in sorted(found.sources().items())}
    return Drawn(found, times)


class Held:
    """Held-out rows of every task, measured with the measure that was passed in."""

    def __init__(self, base: Base, evaluation: Evaluation | None, run: Run) -> None:
        self.base, self.evaluation, self.run = base, evaluation, run
        self.tasks: dict[str, Examples] = {}
        if evaluation is not None:
            data = evaluation.data
            for name in sorted(data.sources()):
                own = (row for row in data if row.source == name)
                self.tasks[name] = type(data)(own, f"{data.name} ({name})")

    def estimates(self, model: Any, stage: str) -> dict[str, Estimate]:
        """Every task measured, once: they are kept in the scratch."""
        if self.evaluation is None:
            return {}
        path = self.run.work / f"estimates-{stage}.json"
        if not path.exists():
            training = model.training
            model.eval()
            tokenizer, method = self.base.tokenizer(), self.evaluation.method
            found = {
                name: of_whole(
                    method.measure(model, tokenizer, rows, self.run.scratch("evaluation"))
                )
                for name, rows in self.tasks.items()
            }
            model.train(training)
            write_json(path, {name: one.to_json() for name, one in found.items()})
            for name, one in found.items():
                say(f"{stage}: {name}: {one.summary()}")
        record = json.loads(path.read_text(encoding="utf-8"))
        return {name: Estimate.from_json(one) for name, one in record.items()}


def train_stages(
    model: Any, base: Base, lora: Lora, stages: list[Stage], held: Held, run: Run
) -> list[dict[str, Any]]:
    """Train `model` through the stages; what was measured before and after each, for the record.

    A stage that is finished is not done again.
    """
    from safetensors.torch import load_file

    longest = min(lora.max_length or base.max_length, base.max_length)
    tokenizer = base.tokenizer()
    before = held.estimates(model, "before")
    found = [{"name": "before", "steps": 0, "rows": {}, "estimates": _briefs(before, None)}]
    steps = 0
    for number, stage in enumerate(stages):
        kept = run.work / f"stage-{number}.safetensors"
        rows = encode(stage.drawn.rows, tokenizer, longest)
        own = -(-len(rows) // lora.batch_size)
        if kept.exists():
            with torch.no_grad():
                for name, tensor in load_file(kept).items():
                    model.get_parameter(name).copy_(tensor)
        else:
            say(f"stage {stage.name}: {stage.drawn.summary()}")
            settings = lora.train_settings(stage.lr, epochs=1, trainable="adapter")
            pad, folder = padding_token(tokenizer), f"stage-{number}"
            fit(model.train(), rows, pad, settings, run, folder=folder, earlier=steps)
            _save(model, kept)
        steps += own
        after = held.estimates(model, stage.name)
        told = stage.told()
        found.append({**told, "steps": own, "estimates": _briefs(after, before)})
        before = after
    return found


def _briefs(
    estimates: dict[str, Estimate], before: dict[str, Estimate] | None
) -> dict[str, dict[str, Any]]:
    """Estimates without items, each with its paired change since the stage before."""
    found = {}
    for name, one in estimates.items():
        found[name] = _brief(one)
        if before is not None and one.n > 1:
            found[name]["change"] = _brief(compare(one, before[name]).difference)
    return found


def _brief(one: Estimate) -> dict[str, Any]:
    full = one.to_json()
    return {key: full[key] for key in ("value", "low", "high", "n", "metric", "better")}


def _save(model: Any, path: Path) -> None:
    from safetensors.torch import save_file

    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    with new_file(path) as temporary:
        save_file({n: p.detach().cpu().contiguous() for n, p in trained}, temporary)
