"""Adapters that are no plain product of factors merge as the changes they are."""

import peft
import tiny
import torch

from deltaloom.core.base import Base
from deltaloom.core.delta import load
from deltaloom.merge.arithmetic import Arithmetic


def adapter_in(folder, base, seed, **settings):
    """A trained-looking PEFT adapter folder."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM", **settings
    )
    model = peft.get_peft_model(base.load(), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


def test_dora_and_whole_modules_merge_as_their_changes(tmp_path):
    base = Base(model=str(tiny.base_in(tmp_path / "base")))
    folders = [
        adapter_in(tmp_path / "dora", base, 0, use_dora=True),
        adapter_in(tmp_path / "whole", base, 1, modules_to_save=["norm"]),
    ]
    deltas = [load(folder, base) for folder in folders]
    method = Arithmetic(weights=[0.5, 2.0])
    merged = method.merge(base, deltas, tiny.run_in(tmp_path / "run"))
    wanted = 0.5 * deltas[0] + 2.0 * deltas[1]
    assert set(wanted.names()) <= set(merged.names())
    for name in merged.names():
        got = merged.to_dense(name)
        change = wanted.to_dense(name) if name in wanted.names() else torch.zeros_like(got)
        assert torch.allclose(got, change, atol=1e-6)
