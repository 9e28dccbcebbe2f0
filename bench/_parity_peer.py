"""The mergekit side of `parity_mergekit.py`; run by the interpreter that has mergekit.

    python bench/_parity_peer.py FOLDER

Reads `jobs.json` and the `.safetensors` beside it, writes `theirs.safetensors`. Where mergekit
leaves it open which of equal elements counts as larger, or draws at random, it is given our order
and our draws, so that what remains to compare is the formula.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from mergekit.merge_methods.api import merge_tensors
from safetensors.torch import load_file, save_file

ARGSORT = torch.argsort


def falling(values: torch.Tensor) -> torch.Tensor:
    """Indices by falling value, the earlier of equals first."""
    return ARGSORT(values, descending=True, stable=True)


def give_order() -> None:
    """Sorting in one fixed order of equals: by falling magnitude, the earlier first."""
    types = torch.return_types

    def argsort(values, dim=-1, descending=False):
        return ARGSORT(values, dim=dim, descending=descending, stable=True)

    def sort(values, descending=False):
        if values.dim() != 1 or descending:
            raise NotImplementedError
        order = falling(values).flip(0)
        return types.sort((values[order], order))

    def topk(values, k, largest=True):
        order = falling(values)[:k]
        return types.topk((values[order], order))

    torch.argsort, torch.sort, torch.topk = argsort, sort, topk


class Draws:
    """Stands for `torch.bernoulli`: one call per model, in order, with draws made elsewhere."""

    def __init__(self, uniform: torch.Tensor):
        self.uniform = iter(uniform)

    def __call__(self, chances: torch.Tensor) -> torch.Tensor:
        draws = next(self.uniform).view(chances.shape)
        return (draws < chances.double()).to(chances.dtype)


def main() -> None:
    """Every job on every tensor in every number format."""
    torch.set_num_threads(1)
    give_order()
    folder = Path(sys.argv[1])
    plan = json.loads((folder / "jobs.json").read_text())
    uniform = load_file(folder / "draws.safetensors")
    results = {}
    for stored in plan["dtypes"]:
        models = [load_file(folder / f"{stored}-{i}.safetensors") for i in range(plan["models"])]
        for job in plan["jobs"]:
            inputs = [models[i] for i in job["places"]]
            for name in models[0]:
                for inside in {stored, "float32", "float64"}:
                    torch.bernoulli = Draws(uniform[name])
                    results[f"{job['name']}/{stored}/{inside}/{name}"] = merge_tensors(
                        [tensors[name] for tensors in inputs],
                        job["method"],
                        parameters={
                            key: dict(enumerate(value)) if isinstance(value, list) else value
                            for key, value in job["parameters"].items()
                        },
                        base_index=job["base"],
                        dtype=getattr(torch, inside),
                        out_dtype=getattr(torch, "float64" if inside == "float64" else stored),
                    ).contiguous()
    save_file(results, folder / "theirs.safetensors")


if __name__ == "__main__":
    main()
