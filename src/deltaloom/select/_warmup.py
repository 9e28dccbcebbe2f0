"""LESS's warm-up checkpoints: adapter weights with Adam's moments, by parameter name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from deltaloom.core.atomic import new_folder, write_json
from deltaloom.engine.gradients import parameter_names

if TYPE_CHECKING:
    from deltaloom.core.base import Base
    from deltaloom.tune.lora import Lora

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8
"""Of LESS's code and of AdamW's defaults."""


def save_epoch(home: Path, trainer: Any, epoch: int, base: Base) -> None:
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


def read_epochs(home: Path) -> list[dict[str, Any]]:
    """The finished epochs in order: their `folder` and mean `lr`."""
    found = sorted(home.glob("epoch-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    return [
        {"folder": path, **json.loads((path / "epoch.json").read_text(encoding="utf-8"))}
        for path in found
    ]


def load_epoch(folder: Path, base: Base, warmup: Lora) -> tuple[Any, tuple[Any, Any]]:
    """The model with that epoch's adapter, and m, v as flat vectors of its D parameters."""
    from safetensors.torch import load_file

    tensors = load_file(folder / "moments.safetensors")
    model = warmup.attach(base, seed=0)
    names = parameter_names(model)
    with torch.no_grad():
        for name in names:
            model.get_parameter(name).copy_(tensors[f"w.{name}"])
    device = model.get_parameter(names[0]).device
    m, v = (
        torch.cat([tensors[f"{kind}.{name}"].flatten().float() for name in names]).to(device)
        for kind in "mv"
    )
    return model, (m, v)


def adam_update(gradients: torch.Tensor, m: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The step Adam would take on each row alone, (n, D), as LESS's code has it."""
    first = BETA1 * m + (1 - BETA1) * gradients
    second = BETA2 * v + (1 - BETA2) * gradients.square()
    return first / (second + EPS).sqrt()
