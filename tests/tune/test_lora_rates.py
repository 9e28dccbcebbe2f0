"""LoRA's learning rates carried over from another width and rank."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import base_in, rows_in, run_in

from deltaloom import Base, Examples
from deltaloom.engine.scaled_adam import LoraScaled
from deltaloom.engine.train import TrainSettings
from deltaloom.tune.lora import Lora

torch.set_num_threads(1)


def change(width, rank, rules, rslora=False, steps=4):
    """Mean change of a wide linear module's output after a few steps towards a random target."""
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(width, 64, bias=False))
    torch.nn.init.normal_(base[0].weight, std=width**-0.5)
    config = LoraConfig(r=rank, lora_alpha=8, target_modules=["0"], use_rslora=rslora)
    model = get_peft_model(base, config)
    x, y = torch.randn(4, width), torch.randn(4, 64)
    ratios = (width / 64, rank / 4) if rules else (1.0, 1.0)
    settings = TrainSettings(epochs=1, lr=3e-3, batch_size=4)
    optimizer = LoraScaled(*ratios, rslora).optimizer(model, settings)
    before = model(x).detach()
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - y).pow(2).mean().backward()
        optimizer.step()
    return (model(x) - before).abs().mean().item()


def slope(values, over):
    x = torch.tensor([math.log(one) for one in over], dtype=torch.float64)
    y = torch.tensor([math.log(one) for one in values], dtype=torch.float64)
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / (x * x).sum())


def test_changes_are_alike_over_widths_with_the_rule_only():
    widths = (64, 256, 1024, 4096)
    assert abs(slope([change(width, 4, True) for width in widths], widths)) < 0.1
    assert slope([change(width, 4, False) for width in widths], widths) > 0.2


def test_changes_are_alike_over_ranks():
    ranks = (4, 16, 64)
    assert abs(slope([change(64, rank, False) for rank in ranks], ranks)) < 0.1
    assert abs(slope([change(64, rank, True, rslora=True) for rank in ranks], ranks)) < 0.1
    assert slope([change(64, rank, False, rslora=True) for rank in ranks], ranks) > 0.4


@pytest.mark.parametrize(("width", "same"), [(16, True), (4, False)])
def test_tune_lora_takes_rates_from_another_width(tmp_path, width, same):
    base = Base(model=str(base_in(tmp_path / "base")))
    data = Examples.read(rows_in(tmp_path / "rows.jsonl"))
    found = []
    for number, more in enumerate(({}, {"lr_width": width, "lr_rank": 8})):
        with run_in(tmp_path / str(number)) as run:
            delta = Lora(epochs=1, lr=0.01, **more).tune(base, data, run)
            found.append(delta.norm())
    assert (found[0] == pytest.approx(found[1], rel=1e-4)) is same
