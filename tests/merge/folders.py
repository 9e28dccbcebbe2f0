"""Tiny models as folders, merged by a method and read back."""

import json

import torch
from safetensors.torch import load_file, save_file

from deltaloom.core.registry import get

SHAPES = {
    "model.embed_tokens.weight": (60, 32),
    "w.weight": (70, 19),
    "norm.weight": (17,),
    "scalar": (),
    "conv.weight": (3, 4, 5),
    "empty.weight": (0, 4),
}
ULP = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 2**-22, torch.float64: 1e-13}


def random_models(count, dtype, seed=0, step=0.1):
    """A base and `count` tuned models as numbers of `dtype`."""
    generator = torch.Generator().manual_seed(seed)
    models = [{n: torch.randn(s, generator=generator).to(dtype) for n, s in SHAPES.items()}]
    for _ in range(count):
        moved = {n: step * torch.randn(s, generator=generator) for n, s in SHAPES.items()}
        models.append({n: (models[0][n].double() + moved[n]).to(dtype) for n in SHAPES})
    return models


def write(folder, models, shards=1):
    """One folder per model."""
    paths = []
    for i, tensors in enumerate(models):
        path = folder / f"model{i}"
        path.mkdir(parents=True)
        (path / "config.json").write_text(json.dumps({"tie_word_embeddings": False}))
        if shards == 1:
            save_file(tensors, path / "model.safetensors", {"format": "pt"})
        else:
            table = {n: f"model-{j % shards}.safetensors" for j, n in enumerate(tensors)}
            for file in set(table.values()):
                save_file({n: t for n, t in tensors.items() if table[n] == file}, path / file)
            index = path / "model.safetensors.index.json"
            index.write_text(json.dumps({"weight_map": table}))
        paths.append(path)
    return paths


def loaded(folder):
    """All tensors of a model folder."""
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


def merged(folder, models, method, seed=0, **settings):
    """The tensors that `method` makes of models[1:] over models[0]."""
    folder.mkdir(parents=True, exist_ok=True)
    base, *deltas = write(folder, models)
    made = get("merge", method).make(settings)
    return loaded(made.merge_folders(base, deltas, folder / "out", seed))


def assert_close(got, wanted, where, scale=None):
    """`got` is the float64 `wanted` rounded to its dtype, up to one unit in the last place (of
    `scale` where terms cancel).
    """
    ulp = ULP[got.dtype]
    size = wanted.abs() if scale is None else scale
    least = 6e-8 if got.dtype == torch.float16 else 1e-30
    wrong = (got.double() - wanted).abs() > ulp * size + least
    assert got.shape == wanted.shape, where
    assert not wrong.any(), (where, got[wrong][:5], wanted[wrong][:5])
    if got.dtype in (torch.bfloat16, torch.float16):  # float32 inside: hardly a rounding differs
        assert (got != wanted.to(got.dtype)).double().mean() <= 0.01 + 1.5 / got.numel(), where
