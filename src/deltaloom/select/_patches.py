"""Tail patches: a few steps on one source alone from a common checkpoint, and what they change.

Every patch is a run of its own in the scratch, so that an interrupted selection keeps those that
are finished.
"""

from __future__ import annotations

import gc
import json
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file

from deltaloom.core.atomic import new_file, write_json
from deltaloom.core.encoding import Encoded, encode
from deltaloom.core.estimate import Estimate, compare
from deltaloom.core.method import of_whole
from deltaloom.core.progress import say
from deltaloom.core.run import Run
from deltaloom.engine.forward import padding_token
from deltaloom.engine.train import fit
from deltaloom.select._ratings import Effect

if TYPE_CHECKING:
    from torch import Tensor

    from deltaloom.core.base import Base
    from deltaloom.core.examples import Examples
    from deltaloom.core.method import Measurer
    from deltaloom.tune.lora import Lora

TAKEN_OVER = ("forward_tokens", "backward_tokens", "flops", "peak_device_bytes")
"""What the ledger takes over from patches; their time and memory are this process's own."""


@dataclass
class Patches:
    """One model whose adapter is put back to the checkpoint before each patch."""

    base: Base
    tuning: Lora
    measurer: Measurer
    targets: Mapping[str, Examples]
    run: Run
    open_model: Callable[[], Any]
    """The base with an adapter to train."""
    sources: tuple[str, ...]
    start: dict[str, Tensor] = field(default_factory=dict)
    """The checkpoint's adapter."""
    _model: Any = None

    @property
    def model(self) -> Any:
        """Loaded when first needed: a resumed selection may need it for nothing."""
        if self._model is None:
            self._model = self.open_model()
        return self._model

    def encode(self, rows: Examples) -> list[Encoded]:
        """Rows as the base sees them, cut to the tuning's length."""
        longest = min(self.tuning.max_length or self.base.max_length, self.base.max_length)
        return encode(rows, self.base.tokenizer(), longest)

    def begin(self, warmup: Examples | None) -> None:
        """Make the checkpoint: the model as opened, or after one pass over `warmup`."""
        path = self.run.work / "checkpoint.safetensors"
        if not path.exists():
            if warmup is not None:
                say(f"a checkpoint from {len(warmup)} rows of the mixture as it is")
                settings = self.tuning.train_settings(self.tuning.lr, trainable="adapter")
                self._fit(self.encode(warmup), settings, self.run, "warmup")
            _save(self.model, path)
        self.start = load_file(path)

    def before(self) -> dict[str, Estimate]:
        """The checkpoint measured on every target."""
        folder = self.run.work / "before"
        with Run.open(folder, {"measure": "checkpoint"}, {}, self.run.seed) as part:
            if not part.done:
                self._put(self.start)
                self._measure(part)
                part.finish()
        return _read(folder, self.targets)

    def patch(self, source: str, rows: Examples, rung: int, steps: int) -> dict[str, Estimate]:
        """`steps` more steps on `rows` of one source, from where the rung before left off."""
        folder = self._folder(source, rung)
        about = {"patch": source, "rung": rung, "steps": steps}
        seed = random.Random(f"tail-patch {self.run.seed} {source} {rung}").getrandbits(31)
        with Run.open(folder, about, {}, seed) as part:
            if not part.done:
                earlier = self._folder(source, rung - 1) / "adapter.safetensors"
                self._put(load_file(earlier) if rung else self.start)
                settings = self.tuning.train_settings(
                    self.tuning.lr,
                    trainable="adapter",
                    epochs=1,
                    schedule="constant_with_warmup",
                    warmup=0.0,
                    save_steps=steps,
                )
                self._fit(self._chunk(rows, rung, steps), settings, part, "patch")
                self._measure(part)
                _save(self.model, folder / "adapter.safetensors")
                part.finish()
        return _read(folder, self.targets)

    def lengths(self, rows: Examples) -> list[int]:
        """Tokens of a source's rows, in the order in which patches take them."""
        encoded = self.encode(rows)
        return [len(encoded[i].input_ids) for i in self._order(rows)]

    def look(self) -> int:
        """Tokens of one measurement of the targets, as that of the checkpoint took."""
        return round(sum(one.cost.get("forward_tokens", 0.0) for one in self.before().values()))

    def account(self, finished: list[tuple[str, int]]) -> dict[str, float]:
        """Enter in the run's ledger what the finished patches (and `before`) cost, once."""
        total: dict[str, float] = dict.fromkeys(TAKEN_OVER, 0.0)
        for folder in (self.run.work / "before", *(self._folder(*one) for one in finished)):
            cost = Run.read(folder)["cost"]
            total = {key: total[key] + cost[key] for key in TAKEN_OVER}
        own = self.run.record["notes"].get("patches_cost")
        if own is None:
            self.run.spend(**total)
            self.run.note(patches_cost=total)
            self.run.save()
        return own or total

    def _folder(self, source: str, rung: int) -> Path:
        # Names of sources are free text: the folder has a number of its own for each.
        number = self.sources.index(source)
        return self.run.work / f"patch-{number}-{rung}"

    def _chunk(self, rows: Examples, rung: int, steps: int) -> list[Encoded]:
        """The rows of a rung: all of the source in a random order, again and again."""
        count = steps * self.tuning.batch_size
        order = self._order(rows)
        numbers = [order[k % len(rows)] for k in range(rung * count, (rung + 1) * count)]
        encoded = dict(zip(dict.fromkeys(numbers), self.encode(_some(rows, numbers)), strict=True))
        return [encoded[i] for i in numbers]

    def _order(self, rows: Examples) -> list[int]:
        order = list(range(len(rows)))
        random.Random(f"rows {self.run.seed}").shuffle(order)
        return order

    def _fit(self, rows: list[Encoded], settings: Any, run: Run, folder: str) -> None:
        pad = padding_token(self.base.tokenizer())
        fit(self.model.train(), rows, pad, settings, run, folder=folder)

    def _measure(self, part: Run) -> None:
        self.model.eval()
        for number, rows in enumerate(self.targets.values()):
            scratch = part.scratch("measuring")
            found = self.measurer.measure(self.model, self.base.tokenizer(), rows, scratch)
            write_json(part.folder / f"target-{number}.json", of_whole(found).to_json())

    def _put(self, tensors: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(tensors[name])


@contextmanager
def settled_heap() -> Iterator[None]:
    """Leave what is loaded by now out of garbage collections.

    Every Trainer asks for a whole one, which takes longer than a patch of a small model.
    """
    if gc.get_freeze_count():  # somebody else's to undo
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def effect(before: Estimate, after: Estimate, steps: int) -> Effect:
    """The paired change, with the sign of an improvement."""
    found = compare(after, before).difference
    if found.better == "higher":
        return Effect(found.value, found.stderr, found.low, found.high, found.n, steps)
    return Effect(-found.value, found.stderr, -found.high, -found.low, found.n, steps)


def _some(rows: Examples, numbers: list[int]) -> Examples:
    return rows.take(dict.fromkeys(numbers))


def _save(model: Any, path: Path) -> None:
    from safetensors.torch import save_file

    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    with new_file(path) as temporary:
        save_file({n: p.detach().cpu().contiguous() for n, p in trained}, temporary)


def _read(folder: Path, targets: Mapping[str, Any]) -> dict[str, Estimate]:
    texts = [(folder / f"target-{k}.json").read_text(encoding="utf-8") for k in range(len(targets))]
    found = (Estimate.from_json(json.loads(text)) for text in texts)
    return dict(zip(targets, found, strict=True))
