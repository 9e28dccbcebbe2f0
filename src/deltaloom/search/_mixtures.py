"""One configuration of `search autopeft`: settings to modules, tuned, kept and measured."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltaloom.core.method import Evaluation, of_whole
from deltaloom.search._study import Outcome
from deltaloom.tune._gradient import GradientSettings, train
from deltaloom.tune.composite import Composite
from deltaloom.tune.lora import save_adapter

if TYPE_CHECKING:
    from deltaloom.core.base import Base
    from deltaloom.core.examples import Examples
    from deltaloom.core.run import Run
    from deltaloom.search.autopeft import Autopeft

KINDS = ("serial", "parallel", "prefix", "lora", "sparse")
GOAL, SIZE = "objective", "log2_parameters"


@dataclass(frozen=True)
class Attempt:
    """Tunes a configuration on `rows`, keeps its adapter in `home`, and measures it."""

    method: Autopeft
    base: Base
    rows: Examples
    inner: Evaluation
    home: Path

    def __call__(self, settings: dict[str, Any], part: Run) -> Outcome:
        """See `search/_study.py`."""
        from deltaloom.engine.meter import training_cost

        tuner = self._tuner(settings)
        model = tuner.attach(self.base, part.seed)
        # A tenth of a run in checkpoints would cost a small trial more than its training.
        every = self.method.save_steps or 10**9
        how = tuner.train_settings(self.method.lr, trainable="adapter", keep=1, save_steps=every)
        model = train(model, self.base, self.rows, part, tuner, how, None)
        count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        folder = self.home / part.folder.name
        shutil.rmtree(folder, ignore_errors=True)
        save_adapter(model, folder, self.base, "composite")
        tokens = round(self.method.epochs * part.record["notes"]["tokens"])
        cost = {**training_cost(model, tokens, "adapter"), "parameters": float(count)}
        value = measured(model, self.base, self.inner, part)
        return Outcome({GOAL: value, SIZE: math.log2(1 + count)}, cost)

    def _tuner(self, settings: dict[str, Any]) -> Composite:
        own = configuration(settings)
        assert own is not None
        shared = {key: getattr(self.method, key) for key in GradientSettings.model_fields}
        return Composite(**{**shared, **own, "lr": self.method.lr})


def configuration(settings: dict[str, Any]) -> dict[str, Any] | None:
    """What `tune composite` takes; None where nothing is on."""
    sizes = {kind: 2 ** (settings[kind] - 1) if settings[kind] else 0 for kind in KINDS}
    bits = [key for key in settings if key.startswith("layer_")]
    layers = [number for number in range(len(bits)) if settings[f"layer_{number}"]]
    if not layers or not any(sizes.values()):
        return None
    return {**sizes, "layers": layers}


def meaning(settings: dict[str, Any]) -> str | None:
    """The same for settings that switch the same modules on; None for those that switch none on."""
    own = configuration(settings)
    return None if own is None else repr(sorted(own.items()))


def measured(model: Any, base: Base, by: Evaluation, run: Run) -> float:
    """The measurement, lower for better."""
    model.eval()
    estimate = of_whole(by.method.measure(model, base.tokenizer(), by.data, run))
    return estimate.value if estimate.better == "lower" else -estimate.value
