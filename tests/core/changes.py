"""What the tests of deltas share: trained adapters, oracles, and comparing changes."""

import shutil
import warnings

import torch
from safetensors.torch import load_file, save_file

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
EXACT = {"rtol": 0.0, "atol": 0.0}


def trained_in(folder, base, seed=0, **config):
    """A PEFT LoRA adapter all of whose trainable tensors have moved, saved as PEFT saves it."""
    from peft import LoraConfig, get_peft_model

    settings = {"task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 3, "target_modules": ["q_proj"]}
    generator = torch.Generator().manual_seed(seed)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model = get_peft_model(base.load(), LoraConfig(**{**settings, **config}))
        for weight in model.parameters():
            if weight.requires_grad:
                weight += torch.randn(weight.shape, generator=generator) * 0.3
        model.save_pretrained(folder)
    return folder


def merged(folder, base):
    """What PEFT's own merge changes, by tensor of the base, float64."""
    from peft import PeftModel

    own = {name: value.double() for name, value in base.load(dtype="float32").state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(base.load(dtype="float32"), folder).double()
        found = model.merge_and_unload().state_dict()
    change = {name: found[name] - value for name, value in own.items()}
    return {name: value for name, value in change.items() if value.abs().max() > 1e-12}


def dense(delta):
    return {name: delta.to_dense(name).double() for name in delta.names()}


def agree(found, wanted, close=True):
    """Equal tensor by tensor, a tensor that one side lacks being zero."""
    for name in {*found} | {*wanted}:
        a, b = found.get(name), wanted.get(name)
        a = torch.zeros_like(b) if a is None else a
        b = torch.zeros_like(a) if b is None else b
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, **({"rtol": 1e-5, "atol": 2e-6} if close else EXACT))


def combined(weighted):
    """The float64 sum of (factor, tensors)."""
    total = {}
    for factor, tensors in weighted:
        for name, value in tensors.items():
            total[name] = total.get(name, 0) + factor * value
    return total


def added(base, change):
    """`base` loaded with the change added by hand."""
    model = base.load()
    state = model.state_dict()
    with torch.no_grad():
        for name, value in change.items():
            state[name] += value.float()
    return model


def with_tensors(source, folder, change):
    """A copy of an adapter whose tensors `change` was given to alter."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    return folder


def tuned_in(folder, base):
    """A whole tuned model, as Trainer leaves it."""
    model = base.load()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for weight in model.parameters():
            weight += torch.randn(weight.shape, generator=generator) * 0.1
    model.save_pretrained(folder)
    base.tokenizer().save_pretrained(folder)
    return folder
