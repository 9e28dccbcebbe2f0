"""PEFT LoRA adapter folders, read: factors, magnitudes, and the tensors that are held whole."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltaloom.core.deltas._factors import Factors
from deltaloom.core.errors import InputError
from deltaloom.core.tensors import TensorEntry, TensorFolder

if TYPE_CHECKING:
    from torch import Tensor

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KEY = re.compile(
    r"^base_model\.model\.(?P<module>.+)\.lora_(?P<table>embedding_)?(?P<side>[AB])"
    r"(\.default)?(\.weight)?$"
)
MAGNITUDE = re.compile(
    r"^base_model\.model\.(?P<module>.+)\.lora_magnitude_vector(\.default)?(\.weight)?$"
)
ADDED = re.compile(r"^base_model\.model\.(?P<module>.+)\.lora_B(\.default)?\.bias$")
"""A bias beside B (`lora_bias`), scaled as B is."""
COPIED = re.compile(r"^base_model\.model\.(?P<module>.+)\.base_layer\.weight$")
"""PEFT puts the base's own embeddings beside adapters of embeddings."""
STALE = re.compile(r"\.(original_module|modules_to_save(\.default)?)\.[^.]+$")
"""PEFT repeats the biases of modules saved whole under these names; loading ignores them."""
WHOLE = re.compile(r"^base_model\.model\.(?P<module>.+?)(\.base_layer)?\.(?P<tensor>[^.]+)$")
"""Trained biases, modules saved whole, and heads that the task adds."""
HEADS = ("lm_head.weight", "embed_out.weight")
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
REFUSED = {
    "trainable_token_indices": "trained token rows",
    "megatron_config": "Megatron layers",
    "layer_replication": "replicated layers",
    "target_parameters": "LoRA on bare parameters",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow routing",
    "monteclora_config": "MonteCLoRA",
    "kasa_config": "KaSA",
}
REBASING = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that change the base's weights as well."""


@dataclass(frozen=True)
class Adapter:
    """What an adapter folder holds, under the names that the model gives its tensors."""

    factors: dict[str, Factors]
    added: dict[str, Tensor]
    """Changes of biases, scaled."""
    whole: dict[str, str]
    """Name -> key in the file of a tensor that replaces the base's."""
    tensors: TensorFolder
    task: str | None


@dataclass(frozen=True)
class WholeChange:
    """Tensors that an adapter holds whole, minus the base's; what the base lacks counts from 0."""

    tensors: TensorFolder
    keys: Mapping[str, str]
    """Name -> key in the adapter's file."""
    base: TensorFolder

    def names(self) -> list[str]:
        """Names of the tensors."""
        return sorted(self.keys)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one."""
        return self.tensors[self.keys[name]].shape

    def to_dense(self, name: str) -> Tensor:
        """Held minus base, in float32."""
        held, own = self.tensors.read(self.keys[name]).float(), known_as(name, self.base)
        return held if own is None else held - self.base.read(own).float()


def known_as(name: str, base: Mapping[str, TensorEntry]) -> str | None:
    """The base's stored tensor that the model calls `name`, None when there is no such tensor.

    Some checkpoints hold the bare model and lack its prefix ("transformer."); a head that the base
    ties to its embeddings has no tensor of its own.
    """
    for known in (name, name.partition(".")[2]):
        if known in base:
            return known
    tables = [own for own in base if own.endswith(EMBEDDINGS)]
    return tables[0] if name in HEADS and len(tables) == 1 else None


def read_adapter(folder: Path, base: TensorFolder | None = None) -> Adapter:
    """The adapter in `folder`, in the layout of `base` when it is given.

    Raises InputError naming any adapter kind that is not covered and, with a base, when the adapter
    does not fit it.
    """
    config = _config(folder)
    if not (folder / WEIGHTS).is_file():
        raise InputError(f"{folder} has no {WEIGHTS}; copy the adapter again, as safetensors")
    tensors = TensorFolder(folder / WEIGHTS)
    sides: dict[str, dict[str, Tensor]] = {}
    tables: set[str] = set()
    added, whole = {}, {}
    for key, entry in tensors.items():
        match = KEY.match(key) or MAGNITUDE.match(key)
        found = match.groupdict() if match else {}
        if COPIED.match(key):
            _check_copy(tensors, key, base)
        elif len(entry.shape) == (2 if "side" in found else 1) and found:
            sides.setdefault(found["module"], {})[found.get("side", "m")] = tensors.read(key)
            if found.get("table"):
                tables.add(found["module"])
        elif ADDED.match(key) and config.get("lora_bias"):
            added[ADDED.sub(r"\g<module>", key)] = tensors.read(key).float()
        elif WHOLE.match(key) and ".lora_" not in key and "F" in entry.dtype:
            if not STALE.search(key):
                whole[WHOLE.sub(r"\g<module>.\g<tensor>", key)] = key
        else:
            raise InputError(
                f"{folder / WEIGHTS}: tensor {key} is not a LoRA factor; "
                "merge the adapter with PEFT"
            )
    if not sides:
        raise InputError(f"{folder / WEIGHTS}: holds no LoRA factors; copy the adapter again")
    factors = {
        f"{module}.weight": _factors(folder, config, module, found, module in tables)
        for module, found in sides.items()
    }
    biases = {f"{m}.bias": value * factors[f"{m}.weight"].scale for m, value in added.items()}
    if base is not None:
        factors = _fitted(folder, factors, base)
        _check_whole(tensors, whole, base)
    return Adapter(factors, biases, whole, tensors, config.get("task_type"))


def read_factors(folder: Path, base: TensorFolder | None = None) -> dict[str, Factors]:
    """Factors by base tensor name of a PEFT LoRA adapter folder; raises as `read_adapter` does.

    Covers LoRA, rsLoRA and DoRA with rank and alpha patterns, on linear, Conv1D and embedding
    modules.
    """
    return read_adapter(folder, base).factors


def _factors(
    folder: Path, config: dict[str, Any], module: str, found: dict[str, Tensor], table: bool
) -> Factors:
    if not {*found} >= {"A", "B"}:
        raise InputError(f"{folder / WEIGHTS}: module {module} lacks lora_A or lora_B")
    a, b, magnitude = found["A"], found["B"], found.get("m")
    if (magnitude is not None) != bool(config.get("use_dora")):
        raise InputError(
            f"{folder / WEIGHTS}: module {module} "
            + ("lacks lora_magnitude_vector" if magnitude is None else "has lora_magnitude_vector")
            + f" but {CONFIG} says use_dora = {bool(config.get('use_dora'))}; copy both again"
        )
    if a.shape[0] != b.shape[1] or (magnitude is not None and len(magnitude) != len(b)):
        raise InputError(f"{folder / WEIGHTS}: the factors of module {module} do not fit together")
    scale = _scaling(config, module, a.shape[0])
    transposed = table or bool(config.get("fan_in_fan_out"))
    return Factors(a, b, scale, transposed, table, magnitude=magnitude)


def _fitted(folder: Path, factors: dict[str, Factors], base: TensorFolder) -> dict[str, Factors]:
    """Factors in the layout of the base's tensors.

    The config's `fan_in_fan_out` is one flag for all modules and only true of the last that PEFT
    met, so an adapter on Conv1D and Linear modules is told apart by the base's shapes. Square
    modules are Conv1D where any other is.
    """
    owned = {name: known_as(name, base) for name in factors}
    shapes = {name: None if own is None else base[own].shape for name, own in owned.items()}
    if not any(shapes.values()):
        raise InputError(
            f"{folder}: adapts {min(factors)} and nothing that {base.path} has; "
            "name the base that the adapter was trained on"
        )
    straight = {name: (own.b.shape[0], own.a.shape[1]) for name, own in factors.items()}
    linear = [name for name in factors if not factors[name].table]
    transposed = {
        name: shapes[name] != straight[name]
        for name in linear
        if shapes[name] is not None and straight[name][0] != straight[name][1]
    }
    for name in linear if transposed else ():
        flipped = transposed.get(name, any(transposed.values()))
        factors[name] = replace(factors[name], transposed=flipped)
    for name, own in factors.items():
        if shapes[name] not in (None, own.shape):
            raise InputError(
                f"{folder}: the change of {name} has shape {list(own.shape)}, the tensor in "
                f"{base.path} {list(shapes[name] or ())}; name the base it was trained on"
            )
        if shapes[name] is None and own.magnitude is not None:
            raise InputError(f"{folder}: DoRA of {name}, which {base.path} does not have")
    return factors


def _check_copy(tensors: TensorFolder, key: str, base: TensorFolder | None) -> None:
    name = COPIED.sub(r"\g<module>.weight", key)
    stored = None if base is None else known_as(name, base)
    if base is None or stored is None:
        return
    copy, own = tensors.read(key), base.read(stored)
    if copy.shape != own.shape or not copy.float().equal(own.float()):
        raise InputError(
            f"{tensors.path}: tensor {key} is not the base's {name}: the embeddings were resized "
            "or trained whole, which is no low-rank change; merge the adapter with PEFT"
        )


def _check_whole(tensors: TensorFolder, whole: dict[str, str], base: TensorFolder) -> None:
    for name, key in whole.items():
        own = known_as(name, base)
        if own is not None and base[own].shape != tensors[key].shape:
            raise InputError(
                f"{tensors.path}: tensor {key} has shape {list(tensors[key].shape)}, the base's "
                f"{own} {list(base[own].shape)}; name the base that the adapter was trained on"
            )


def adapter_config(folder: Path) -> dict[str, Any]:
    """The folder's `adapter_config.json`, whatever its kind; raises InputError when it is none."""
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{folder} has no {CONFIG}: not an adapter folder") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path} line {error.lineno}: not JSON ({error.msg})") from None
    if not isinstance(config, dict):
        raise InputError(f"{path}: must be an object; copy the adapter again")
    return config


def _config(folder: Path) -> dict[str, Any]:
    path, config = folder / CONFIG, adapter_config(folder)
    if config.get("peft_type") != "LORA":
        raise InputError(f"{path}: adapter kind {config.get('peft_type')!r} is not low-rank (LORA)")
    for key, kind in REFUSED.items():
        if config.get(key):
            raise InputError(f"{path}: {kind} ({key}) is no low-rank change; merge it with PEFT")
    if config.get("ensure_weight_tying") and config.get("modules_to_save"):
        raise InputError(
            f"{path}: modules saved whole and tied (ensure_weight_tying) are two tensors that "
            "cannot be told apart; merge the adapter with PEFT"
        )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(REBASING):
        raise InputError(
            f"{path}: init_lora_weights = {start!r} changes the base as well, so this is no "
            "low-rank change; convert it with PEFT's path_initial_model_for_weight_conversion"
        )
    return config


def _scaling(config: dict[str, Any], module: str, rank: int) -> float:
    # PEFT's default alpha is 8.
    alpha = _by_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", 8))
    return alpha / rank**0.5 if config.get("use_rslora") else alpha / rank


def _by_pattern(patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
    # PEFT's rule: the first pattern that matches the whole end of the module's dotted name.
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
