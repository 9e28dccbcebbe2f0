"""Whole merges by mergekit's YAML, ours in its compatibility mode beside mergekit 0.1.5's.

Small Llama folders (a base and four models) in bfloat16, float16 and float32, with tensors of more
than a million elements and rows that no vector register divides; settings with gradients and
filters. Distances are in units in the last place of the output's format at the
largest of the inputs and the output at that element; equality is of bits.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import torch
import yaml
from safetensors.torch import load_file, save_file

from deltaloom.merge._checked import check
from deltaloom.merge._config import parse_config
from deltaloom.merge._kernels import GROUP, draw
from deltaloom.merge._mergekit import Job
from deltaloom.merge._rules import _key

DTYPES = ("bfloat16", "float16", "float32")
LAYERS, HIDDEN, INNER, VOCABULARY = 3, 264, 700, 4300
MODELS = ("base", "a", "b", "c", "d", "far")
SEED = 3
QUICK = ("linear of 3", "task_arithmetic of 2", "ties of 3", "dare_ties", "slerp", "karcher")
"""Configurations of a quick run, in bfloat16."""

RISING = [0.2, 0.9, 0.5]
BY_FILTER = [{"filter": "mlp", "value": [0.3, 0.8]}, {"filter": "norm", "value": 0.45}, 0.7]


def _by(setting):
    return [one if isinstance(one, dict) else {"value": one} for one in setting]


def _models(names: str, **settings):
    return [
        {"model": name, "parameters": {key: values[i] for key, values in settings.items()}}
        for i, name in enumerate(names)
    ]


def _family(method: str, names: str, **more):
    """Task arithmetic and its kin with settings that differ by model, layer and filter."""
    shared = more.pop("shared", {})
    weights = [[0.3, 0.7], _by(BY_FILTER), 0.45, -0.2]
    return {
        "merge_method": method,
        "base_model": "base",
        "models": _models(names, weight=weights, **more),
        "parameters": shared,
    }


DENSITY = [RISING, _by(BY_FILTER), 0.35, 0.6]
INSIDE = [[0.3, 0.6], 0.5, 0.35, 0.7]
ENDS = [{"model": "base"}, {"model": "a"}]
T = [{"filter": "self_attn", "value": [0, 0.5, 0.3, 1]}, {"filter": "mlp", "value": [1, 0.2]}]
CONFIGS: dict[str, dict] = {
    "linear of 2, normalized": {
        "merge_method": "linear",
        "models": _models("ab", weight=[[1.0, 0.2], _by(BY_FILTER)]),
    },
    "linear of 3": {
        "merge_method": "linear",
        "models": _models("abc", weight=[[1.0, 0.2], _by(BY_FILTER), 0.3]),
        "parameters": {"normalize": False},
    },
    "linear of 4, normalized": {
        "merge_method": "linear",
        "models": _models("abcd", weight=[[1.0, 0.2], _by(BY_FILTER), 0.3, 1 / 3]),
    },
    "task_arithmetic of 1": _family("task_arithmetic", "a"),
    "task_arithmetic of 2": _family("task_arithmetic", "ab", shared={"lambda": [0.7, 1.1]}),
    "task_arithmetic of 3": _family("task_arithmetic", "abc", shared={"normalize": True}),
    "task_arithmetic of 4": _family("task_arithmetic", "abcd"),
    "passthrough": {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [{"model": "a", "layer_range": [0, 2]}]},
            {
                "sources": [
                    {
                        "model": "b",
                        "layer_range": [1, 3],
                        "parameters": {"scale": [{"filter": "o_proj", "value": 0.7}]},
                    }
                ]
            },
        ],
    },
    "ties of 2": _family("ties", "ab", density=DENSITY, shared={"int8_mask": True}),
    "ties of 3": _family("ties", "abc", density=DENSITY, shared={"lambda": 0.8}),
    "ties of 4": _family("ties", "abcd", density=DENSITY, shared={"normalize": False}),
    "ties, rescaled": _family("ties", "ab", density=DENSITY, shared={"rescale": True}),
    "breadcrumbs": _family("breadcrumbs", "ab", density=DENSITY, gamma=[0.05, 0.2]),
    "breadcrumbs_ties": _family("breadcrumbs_ties", "abc", density=DENSITY, gamma=[0.01, 0.1, 0.0]),
    "dare_linear": _family("dare_linear", "ab", density=DENSITY),
    "dare_ties": _family("dare_ties", "abc", density=DENSITY),
    "dare_ties, not rescaled": _family(
        "dare_ties", "ab", density=DENSITY, shared={"rescale": False}
    ),
    "della_linear": _family("della_linear", "ab", density=INSIDE),
    "della": _family("della", "abc", density=INSIDE, epsilon=[0.1, 0.15, 0.2]),
    "slerp": {
        "merge_method": "slerp",
        "base_model": "base",
        "models": [{"model": "base"}, {"model": "far"}],
        "parameters": {"t": [*T, {"value": 0.4}]},
    },
    "slerp of near models": {
        "merge_method": "slerp",
        "base_model": "base",
        "models": ENDS,
        "parameters": {"t": [*T, {"value": 0.4}]},
    },
    "nearswap": {
        "merge_method": "nearswap",
        "base_model": "base",
        "models": ENDS,
        "parameters": {"t": [0.001, 0.02]},
    },
    "arcee_fusion": {"merge_method": "arcee_fusion", "base_model": "base", "models": ENDS},
    "nuslerp": {"merge_method": "nuslerp", "models": _models("ab", weight=[[1, 2], 3])},
    "nuslerp of changes": {
        "merge_method": "nuslerp",
        "base_model": "base",
        "models": _models("ab", weight=[[1, 2], 3]),
    },
    "nuslerp of changes by row": {
        "merge_method": "nuslerp",
        "base_model": "base",
        "models": _models("ab", weight=[[1, 2], 3]),
        "parameters": {"nuslerp_flatten": False},
    },
    "nuslerp along the first axis": {
        "merge_method": "nuslerp",
        "models": _models("ab", weight=[[1, 2], 3]),
        "parameters": {"nuslerp_flatten": False, "nuslerp_row_wise": True},
    },
    "multislerp": {"merge_method": "multislerp", "models": _models("abc", weight=[[1, 2], 2, 3])},
    "multislerp of changes": {
        "merge_method": "multislerp",
        "base_model": "base",
        "models": _models("abc", weight=[[1, 2], 2, 3]),
    },
    "karcher": {"merge_method": "karcher", "models": [{"model": name} for name in "abc"]},
    "model_stock": {
        "merge_method": "model_stock",
        "base_model": "base",
        "models": [{"model": name} for name in "abc"],
    },
    "model_stock by row": {
        "merge_method": "model_stock",
        "base_model": "base",
        "models": [{"model": name} for name in "ab"],
        "parameters": {"filter_wise": True},
    },
    "sce": {
        "merge_method": "sce",
        "base_model": "base",
        "models": [{"model": name} for name in "abc"],
        "parameters": {"select_topk": [0.2, 0.6]},
    },
    "ram": {
        "merge_method": "ram",
        "base_model": "base",
        "models": [{"model": name} for name in "abc"],
        "parameters": {"epsilon": 0.01},
    },
    "ramplus_tl": {
        "merge_method": "ramplus_tl",
        "base_model": "base",
        "models": [{"model": name} for name in "abc"],
        "parameters": {"epsilon": 0.01, "alpha": 0.5},
    },
}
MIXED = {
    "linear, dtype bfloat16": ("linear of 3", "float32", {"dtype": "bfloat16"}),
    "ties, dtype bfloat16": ("ties of 3", "float32", {"dtype": "bfloat16"}),
    "ties, out_dtype bfloat16": (
        "ties of 2", "float16", {"dtype": "float32", "out_dtype": "bfloat16"},
    ),
    "task_arithmetic, out_dtype float16": (
        "task_arithmetic of 3", "bfloat16", {"dtype": "float32", "out_dtype": "float16"},
    ),
}  # fmt: skip
"""More: (which, format of the models, types asked for)."""


def shapes() -> dict[str, tuple[int, ...]]:
    """A small Llama's tensors."""
    found = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        found |= {f"{layer}self_attn.{k}_proj.weight": (HIDDEN, HIDDEN) for k in "qkvo"}
        found |= {f"{layer}mlp.{k}_proj.weight": (INNER, HIDDEN) for k in ("gate", "up")}
        found[f"{layer}mlp.down_proj.weight"] = (HIDDEN, INNER)
        found |= {f"{layer}{k}_layernorm.weight": (HIDDEN,) for k in ("input", "post_attention")}
    return {**found, "lm_head.weight": (VOCABULARY, HIDDEN)}


def make_models(home: Path) -> None:
    """The models in every format, `home/DTYPE/NAME`; some numbers are 0, -0 and unchanged."""
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
        "intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
        "vocab_size": VOCABULARY, "tie_word_embeddings": False,
    }  # fmt: skip
    draws = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=draws) for name, shape in shapes().items()}
    shared = {name: torch.randn(shape, generator=draws) for name, shape in shapes().items()}
    for name in MODELS:
        step = {"base": 0.0, "far": 1.0}.get(name, 0.03)
        tensors = {}
        for key, start in base.items():
            own = torch.randn(start.shape, generator=draws)
            moved = start + step * (shared[key] + own)
            still = torch.rand(start.shape, generator=draws) < 0.1
            moved = torch.where(still, start, moved).flatten()
            moved[:4] = torch.tensor([0.0, -0.0, -0.0, 0.0])
            tensors[key] = moved.reshape(start.shape)
        for dtype in DTYPES:
            folder = home / dtype / name
            folder.mkdir(parents=True)
            made = {key: one.to(getattr(torch, dtype)) for key, one in tensors.items()}
            save_file(made, folder / "model.safetensors", {"format": "pt"})
            (folder / "config.json").write_text(json.dumps({**config, "dtype": dtype}))


def draws(name: str, count: int) -> torch.Tensor:
    """Our random numbers (4, count) in [0, 1) for a tensor, float64."""
    rows = []
    for place in range(4):
        words = np.empty((4, GROUP), np.uint64)
        parts = []
        for group in range(-(-count // (4 * GROUP))):
            draw(group, *_key(SEED, name, place), words)
            parts.append(words.ravel().copy())
        rows.append(np.concatenate(parts)[:count].astype(np.float64) / 2**32)
    return torch.from_numpy(np.stack(rows))


def jobs(quick: bool = False) -> dict[str, tuple[str, dict]]:
    """Name -> (format of the models, document)."""
    if quick:
        return {name: ("bfloat16", _in("bfloat16", CONFIGS[name])) for name in QUICK}
    found = {
        f"{name}, {dtype}": (dtype, config) for dtype in DTYPES for name, config in CONFIGS.items()
    }
    for name, (which, dtype, kinds) in MIXED.items():
        found[name] = (dtype, {**CONFIGS[which], **kinds})
    return {name: (dtype, _in(dtype, config)) for name, (dtype, config) in found.items()}


def _in(dtype: str, value):
    """The document with its models' names as paths: mergekit keeps open what it once opened."""
    if isinstance(value, list):
        return [_in(dtype, one) for one in value]
    if isinstance(value, dict):
        return {
            key: f"{dtype}/{one}" if key in ("model", "base_model") else _in(dtype, one)
            for key, one in value.items()
        }
    return value


def peer(home: Path, python: str, jobs: dict) -> None:
    """Let mergekit write `home/theirs/NUMBER` for every job."""
    save_file(
        {n: draws(n, int(np.prod(s))) for n, s in shapes().items()}, home / "draws.safetensors"
    )
    (home / "jobs.json").write_text(json.dumps(list(jobs.values())))
    script = str(Path(__file__).with_name("_parity_yaml_peer.py"))
    subprocess.run([python, script, str(home)], check=True)


def ours(home: Path, out: Path, config: dict) -> dict:
    """Our result of one job."""
    checked = check(parse_config(config, "job"), "job")
    job = Job(checked, lambda files: home / files.path, seed=SEED)
    job.run(out, 1, 5_000_000_000, yaml=yaml.safe_dump(config).encode())
    return load_file(out / "model.safetensors")


def unit(home: Path, dtype: str, name: str, result: torch.Tensor) -> torch.Tensor:
    """The unit in the last place of `result`'s format at the largest of inputs and output."""
    largest = result.double().abs()
    for model in MODELS[:5]:
        tensors = load_file(home / dtype / model / "model.safetensors")
        if name in tensors:  # a stack has more layers than the models
            largest = torch.maximum(largest, tensors[name].double().abs())
    least = 2.0**-14 if result.dtype == torch.float16 else 1e-30
    return torch.finfo(result.dtype).eps * 2 ** largest.clamp(min=least).log2().floor()


def compare(home: Path, jobs: dict) -> list[tuple[str, float, float, float]]:
    """Per job: its name, the share of elements that are not equal to the bit, the share further
    away than a unit, the largest distance.
    """
    rows = []
    for number, (name, (dtype, config)) in enumerate(jobs.items()):
        mine = ours(home, home / "ours" / str(number), config)
        theirs = load_file(home / "theirs" / str(number) / "model.safetensors")
        unequal = beyond = count = 0
        worst = 0.0
        for key, result in theirs.items():
            got = mine[key]
            wanted = result.to(got.dtype)
            bits = torch.int16 if got.element_size() == 2 else torch.int32
            unequal += int((got.view(bits) != wanted.view(bits)).sum())
            apart = (got.double() - wanted.double()).abs() / unit(home, dtype, key, wanted)
            beyond += int((apart > 1).sum())
            worst, count = max(worst, apart.max().item()), count + got.numel()
        rows.append((name, unequal / count, beyond / count, worst))
    return rows
