"""Tiny specialists over one base, with rows of their own, in any float type."""

import json

import tiny
import torch
from safetensors.torch import load_file, save_file

from deltaloom.core.base import Base
from deltaloom.core.examples import Examples


def as_type(folder, dtype):
    """Rewrite a float32 model folder in another type."""
    file = folder / "model.safetensors"
    kind = getattr(torch, dtype)
    save_file({n: t.to(kind) for n, t in load_file(file).items()}, file, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": dtype}))
    return folder


def disturbed(base, folder, seed, size=0.1, only=""):
    """A copy of the base with noise on the tensors whose names have `only`."""
    import shutil

    shutil.copytree(base, folder)
    noise = torch.Generator().manual_seed(seed)
    tensors = load_file(folder / "model.safetensors")
    for name in sorted(tensors):
        if only in name:
            moved = torch.randn(tensors[name].shape, generator=noise) * size
            tensors[name] = (tensors[name].double() + moved).to(tensors[name].dtype)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def make(home, dtype="float64", only="", config=None, counts=(24, 30)):
    """Base, folders of two specialists, and their rows."""
    base = tiny.base_in(home / "base", **(config or {}))
    as_type(base, dtype)
    models = [disturbed(base, home / f"m{seed}", seed, only=only) for seed in (1, 2)]
    data = [
        Examples.read(tiny.rows_in(home / f"rows{i}.jsonl", count, offset=100 * i))
        for i, count in enumerate(counts)
    ]
    return Base(model=str(base)), models, data


def each_row(data, base):
    """Ids (1, T) of every row alone, so that nothing is padded."""
    from deltaloom.core.encoding import encode

    return [
        (torch.tensor([row.input_ids]), torch.tensor([row.response_mask]))
        for row in encode(data, base.tokenizer(), 64)
    ]
