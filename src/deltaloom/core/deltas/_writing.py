"""Low-rank changes written as one PEFT adapter folder that PEFT itself reads back.

Scales are folded into B, so alpha is the rank everywhere. As soon as one module needs multiples of
the base's rows, all are written as DoRA; the others get the magnitudes that leave them as they are.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltaloom.core.atomic import new_file, write_json
from deltaloom.core.deltas._factors import Factors
from deltaloom.core.deltas._reading import CONFIG, WEIGHTS, known_as
from deltaloom.core.errors import InputError
from deltaloom.core.tensors import TensorFolder

if TYPE_CHECKING:
    from torch import Tensor

PREFIX = "base_model.model."


def copy_adapter(source: Path, folder: Path) -> None:
    """Write an adapter folder's config and weights into `folder`, made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    if source.resolve() != folder.resolve():
        for name in (WEIGHTS, CONFIG):
            with new_file(folder / name) as temporary:
                shutil.copyfile(source / name, temporary)


def write_adapter(
    folder: Path,
    factors: Mapping[str, Factors],
    rest: Mapping[str, Tensor],
    base: TensorFolder,
    model: str,
    task: str | None,
) -> None:
    """Write settled `factors` and the dense changes of the tensors in `rest`.

    Biases of adapted modules become trained biases, or biases beside B where the base has none;
    everything else in `rest` is a module saved whole. Raises InputError for a change that no PEFT
    adapter can say: none with factors, or such a bias together with DoRA.
    """
    from safetensors.torch import save_file

    if not factors:
        raise InputError(
            f"{folder}: the delta changes no tensor by factors, so there is no adapter to write; "
            "add it to a dense delta of the same base and save that"
        )
    dora = any(own.rows is not None for own in factors.values())
    tensors: dict[str, Tensor] = {}
    for name, own in factors.items():
        weight = _weight(folder, name, base) if dora else None
        tensors |= _factor_tensors(name, own, weight)
    config = _config(factors, model, task)
    config |= _add_rest(folder, tensors, factors, rest, base, dora)
    with new_file(folder / WEIGHTS) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    write_json(folder / CONFIG, {**config, "use_dora": dora})


def _factor_tensors(name: str, own: Factors, weight: Tensor | None) -> dict[str, Tensor]:
    module = PREFIX + name.removesuffix(".weight")
    stem, end = f"{module}.lora_" + "embedding_" * own.table, "" if own.table else ".weight"
    own = own if weight is None else own.with_magnitude(weight)
    found = {
        f"{stem}A{end}": own.a.float().contiguous(),
        f"{stem}B{end}": (own.b.float() * own.scale).contiguous(),
    }
    if own.magnitude is not None:
        found[f"{module}.lora_magnitude_vector"] = own.magnitude.contiguous()
    return found


def _weight(folder: Path, name: str, base: TensorFolder) -> Tensor:
    own = known_as(name, base)
    if own is None:
        raise InputError(
            f"{folder}: DoRA of {name} needs the base's weight, which {base.path} lacks"
        )
    return base.read(own)


def _config(factors: Mapping[str, Factors], model: str, task: str | None) -> dict[str, Any]:
    ranks = {name.removesuffix(".weight"): own.a.shape[0] for name, own in factors.items()}
    top = max(ranks.values())
    others = {module: rank for module, rank in ranks.items() if rank != top}
    return {
        "peft_type": "LORA",
        "task_type": task or "CAUSAL_LM",
        "base_model_name_or_path": model,
        "inference_mode": True,
        "r": top,
        # alpha = r makes the scaling one: it is folded into B.
        "lora_alpha": top,
        "rank_pattern": others,
        "alpha_pattern": others,
        "lora_dropout": 0.0,
        "fan_in_fan_out": any(own.transposed and not own.table for own in factors.values()),
        "target_modules": sorted(ranks),
    }


def _add_rest(
    folder: Path,
    tensors: dict[str, Tensor],
    factors: Mapping[str, Factors],
    rest: Mapping[str, Tensor],
    base: TensorFolder,
    dora: bool,
) -> dict[str, Any]:
    """Put the dense changes among `tensors`; returns the settings that make PEFT read them."""
    trained, beside, modules = False, False, set()
    for name, change in rest.items():
        module, _, tensor = name.rpartition(".")
        own, adapted = known_as(name, base), f"{module}.weight" in factors
        value = change if own is None else base.read(own).float() + change
        if tensor == "bias" and own is not None and f"{module}.weight" not in rest:
            trained, middle = True, ".base_layer" if adapted else ""
            tensors[f"{PREFIX}{module}{middle}.bias"] = value.contiguous()
        elif tensor == "bias" and adapted:
            beside = True
            tensors[f"{PREFIX}{module}.lora_B.bias"] = value.contiguous()
        elif adapted:
            raise InputError(f"{folder}: {name} lies inside an adapted module; save it as dense")
        else:
            modules.add(module)
            tensors[PREFIX + name] = value.contiguous()
    _complete(tensors, modules, base)
    if beside:
        _add_missing_biases(folder, tensors, factors, dora)
    return {
        "bias": "all" if trained else "none",
        "lora_bias": beside,
        "modules_to_save": sorted(modules) or None,
    }


def _complete(tensors: dict[str, Tensor], modules: set[str], base: TensorFolder) -> None:
    # A module saved whole brings all its tensors.
    under = {module.partition(".")[2]: module for module in modules} | {m: m for m in modules}
    for name in base:
        parent, _, tensor = name.rpartition(".")
        if parent in under:
            key = f"{PREFIX}{under[parent]}.{tensor}"
            tensors.setdefault(key, base.read(name).float())


def _add_missing_biases(
    folder: Path, tensors: dict[str, Tensor], factors: Mapping[str, Factors], dora: bool
) -> None:
    # PEFT's lora_bias is one switch for all modules, and neither DoRA nor embeddings have it.
    import torch

    if dora or any(own.table for own in factors.values()):
        raise InputError(
            f"{folder}: PEFT has no adapter with biases beside B and DoRA or embeddings; "
            "add it to a dense delta of the same base and save that"
        )
    for name, own in factors.items():
        key = f"{PREFIX}{name.removesuffix('.weight')}.lora_B.bias"
        tensors.setdefault(key, torch.zeros(own.b.shape[0]))
