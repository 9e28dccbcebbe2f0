"""LESS's warm-up run: its epochs' adapter weights with Adam's moments, by parameter name."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from deltaloom.core.atomic import new_folder, write_json
from deltaloom.core.errors import InputError
from deltaloom.core.spec import canonical, first_difference
from deltaloom.engine.forward import padding_token
from deltaloom.engine.preconditioning import Adam
from deltaloom.engine.train import fit
from deltaloom.select.random import draw

if TYPE_CHECKING:
    from deltaloom.core.examples import Examples
    from deltaloom.core.run import Run
    from deltaloom.select._influence import Sketching


@dataclass(frozen=True)
class Epoch:
    """A checkpoint of the warm-up run."""

    folder: Path
    lr: float
    """Mean learning rate over its optimizer steps."""


@contextmanager
def kept_folder(path: str | None, run: Run) -> Iterator[Path]:
    """The folder for warm-up and features, held by this process alone; the run's scratch if None.

    Raises InputError when another process works in it.
    """
    if path is None:
        yield run.work
        return
    home = Path(path)
    home.mkdir(parents=True, exist_ok=True)
    lock = os.open(home, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"features = {home} is in use by another run; wait for it or choose another folder"
            ) from None
        yield home
    finally:
        os.close(lock)


def warm_up(
    sketching: Sketching, fraction: float, pool: Examples, run: Run, home: Path
) -> list[Epoch]:
    """The epochs of a LoRA run on a random part of the pool, trained unless they are in `home`.

    Raises InputError when `home` holds the warm-up of other settings.
    """
    warmup, base = sketching.warmup, sketching.base
    about = {
        "base": base.fingerprint(),
        "pool": pool.digest(),
        "fraction": fraction,
        "settings": warmup.model_dump(mode="json"),
        "seed": sketching.seed,
    }
    said = home / "warmup.json"
    if said.exists():
        there = json.loads(said.read_text(encoding="utf-8"))
        if canonical(there) != canonical(about):
            where = first_difference(there, about, "warm-up")
            raise InputError(
                f"{home} holds the features of another warm-up (different {where}); choose another "
                "features= folder or remove that one"
            )
    write_json(said, about)
    total, folder = round(warmup.epochs), home / "warmup"
    done = read_epochs(folder)
    if len(done) == total:
        return done
    count = max(1, round(fraction * len(pool)))
    # Not the rows that `select random` draws at this seed: the two are compared.
    rows = sketching.encode(pool.take(draw(len(pool), count, (run.seed, 1))))
    run.note(warmup_rows=len(rows))
    fit(
        warmup.attach(base, run.seed),
        rows,
        padding_token(base.tokenizer()),
        warmup.train_settings(warmup.lr, epochs=total, save_steps=0, trainable="adapter"),
        run,
        folder="warmup-training",
        after_epoch=lambda trainer, epoch: save_epoch(folder, trainer, epoch),
    )
    return read_epochs(folder)


def save_epoch(home: Path, trainer: Any, epoch: int) -> None:
    """Write the adapter, m and v of every trained parameter, and the epoch's mean lr."""
    from safetensors.torch import save_file

    model, optimizer = trainer.model, trainer.optimizer
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    home.mkdir(parents=True, exist_ok=True)
    with new_folder(home / f"epoch-{epoch}") as folder:
        tensors = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                state = optimizer.state[parameter]
                tensors[f"w.{name}"] = parameter.detach().cpu().contiguous()
                tensors[f"m.{name}"] = state["exp_avg"].cpu().contiguous()
                tensors[f"v.{name}"] = state["exp_avg_sq"].cpu().contiguous()
        save_file(tensors, folder / "moments.safetensors")
        write_json(folder / "epoch.json", {"lr": mean_lr(trainer, epoch)})


def mean_lr(trainer: Any, epoch: int) -> float:
    """Mean learning rate over the optimizer steps of one epoch, from the schedule itself."""
    state = trainer.state
    steps = round(state.max_steps / state.num_train_epochs)
    schedule = trainer.lr_scheduler
    schedule = getattr(schedule, "scheduler", schedule)
    factor, base = schedule.lr_lambdas[0], schedule.base_lrs[0]
    numbers = range((epoch - 1) * steps, epoch * steps)
    return base * sum(factor(step) for step in numbers) / steps


def read_epochs(home: Path) -> list[Epoch]:
    """The finished epochs in order."""
    found = sorted(home.glob("epoch-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    return [
        Epoch(path, json.loads((path / "epoch.json").read_text(encoding="utf-8"))["lr"])
        for path in found
    ]


def load_epoch(epoch: Epoch, sketching: Sketching) -> tuple[Any, Adam]:
    """The model with that epoch's adapter, and the optimizer's moments.

    The adapter has the base's type: it is not trained here, and mixed types cost a bfloat16 pass
    more than a quarter of its time.
    """
    from safetensors.torch import load_file

    tensors = load_file(epoch.folder / "moments.safetensors")
    model = sketching.warmup.attach(sketching.base, seed=0)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(tensors[f"w.{name}"])
    model.to(model.get_input_embeddings().weight.dtype)
    m, v = ({name: tensors[f"{kind}.{name}"].float() for name in trained} for kind in "mv")
    return model, Adam(m, v)
