"""What a path holds, and whether it is whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deltaloom.core.delta import ADAPTERS, adapter_kind
from deltaloom.core.errors import InputError
from deltaloom.core.examples import Examples
from deltaloom.core.features import Features
from deltaloom.core.run import Run
from deltaloom.core.tensors import TensorFolder
from deltaloom.recipe.execute import SCORES


def inspect(path: Path) -> dict[str, Any]:
    """`kind` and facts of a data file or of a features, run, adapter or model folder.

    Raises InputError naming the first thing that is missing, cut short or foreign.
    """
    if path.is_file() and path.suffix != ".safetensors":
        data = Examples.read(path)
        return {"kind": "data", "rows": len(data), "sources": dict(data.sources())}
    if path.is_file():
        return {"kind": "tensors", "tensors": len(TensorFolder(path))}
    if not path.is_dir():
        raise InputError(f"{path}: no such file or folder")
    if (path / "header.json").exists():
        store = Features.open(path)
        dtype = store.header["dtype"]
        return {"kind": "features", "rows": len(store), "width": store.width, "dtype": dtype}
    facts: dict[str, Any] = {}
    if (path / "run.json").exists():
        record = Run.read(path)
        facts = {"kind": "run", "status": record["status"], "steps": record["recipe"]["steps"]}
        facts["steps"] = [next(iter(step)) for step in record["recipe"]["steps"]]
        if (path / SCORES).exists():
            inspect(path / SCORES)
    return {**facts, **_weights(path, bool(facts))}


def _weights(path: Path, is_run: bool) -> dict[str, Any]:
    if (path / "adapter_config.json").exists():
        adapter = str(adapter_kind(path))
        if adapter in ADAPTERS:  # of the others LowRank knows what they must hold
            tensors = TensorFolder(path / "adapter_model.safetensors")
            kind = f"{ADAPTERS[adapter].called} adapter"
            return {"kind": kind, "tensors": len(tensors), "bytes": tensors.nbytes}
        from deltaloom.core.deltas.lowrank import read_factors

        return {"kind": "adapter", "modules": len(read_factors(path))}
    stores = {
        "delta.safetensors": "dense delta",
        "trace.safetensors": "trace",
        "vocab.safetensors": "vocabulary delta",
    }
    for stored, kind in stores.items():
        if (path / stored).exists():
            return {"kind": kind, "tensors": len(TensorFolder(path / stored))}
    if (path / "config.json").exists():
        tensors = TensorFolder(path)
        return {"kind": "model", "tensors": len(tensors), "bytes": tensors.nbytes}
    if is_run:
        return {}
    raise InputError(f"{path}: holds no model, adapter, features, run or data")
