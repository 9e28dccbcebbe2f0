"""Low-rank deltas: PEFT LoRA adapters, on disk unchanged, as exact vectors in memory.

A change is `factor * scaling * B @ A` per module, with scaling alpha / r (LoRA, Hu et al. 2021,
section 4.1) or alpha / sqrt(r) (rsLoRA, Kalajdzievski 2023). Sums concatenate the factors, so they
stay exact and low-rank; nothing is densified until `to_dense` asks for one tensor.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltaloom.core.atomic import new_file, write_json
from deltaloom.core.base import Base
from deltaloom.core.delta import Delta, describe
from deltaloom.core.deltas.dense import Dense
from deltaloom.core.errors import InputError
from deltaloom.core.tensors import TensorFolder

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KEY = re.compile(
    r"^base_model\.model\.(?P<module>.+)\.lora_(?P<table>embedding_)?(?P<side>[AB])"
    r"(\.default)?(\.weight)?$"
)
COPIED = re.compile(r"^base_model\.model\.(?P<module>.+)\.base_layer\.weight$")
"""PEFT puts the base's own embeddings beside adapters of embeddings."""
REFUSED = {
    "use_dora": "DoRA",
    "lora_bias": "LoRA with bias",
    "modules_to_save": "modules saved whole",
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
class Factors:
    """One module's change `scale * B @ A`, transposed when the base stores its weight so."""

    a: Tensor
    """(r, in)"""
    b: Tensor
    """(out, r)"""
    scale: float
    transposed: bool = False
    table: bool = False
    """Whether the module is an embedding, whose factors PEFT names differently."""

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the base's weight."""
        out, into = self.b.shape[0], self.a.shape[1]
        return (into, out) if self.transposed else (out, into)

    def dense(self) -> Tensor:
        """The change in the base's layout, float32."""
        change = (self.b.float() @ self.a.float()) * self.scale  # (out, in)
        return change.T if self.transposed else change

    def joined(self, other: Factors) -> Factors:
        """Both changes as one of rank r1 + r2, exactly."""
        import torch

        if other.transposed != self.transposed:
            other = replace(other, a=other.b.T, b=other.a.T, transposed=self.transposed)
        if 0.0 in (self.scale, other.scale):
            return self if other.scale == 0.0 else other
        mine, theirs = self.b.float() * self.scale, other.b.float() * other.scale
        a = torch.cat([self.a.float(), other.a.float()])  # (r1 + r2, in)
        b = torch.cat([mine, theirs], dim=1)  # (out, r1 + r2)
        return Factors(a, b, 1.0, self.transposed, self.table or other.table)

    def dot(self, other: Factors) -> float:
        """Inner product through r1 x r2 matrices: tr((B1'B2)(A2 A1'))."""
        bb = self.b.double().T @ other.b.double()  # (r1, r2)
        aa = self.a.double() @ other.a.double().T  # (r1, r2)
        return float((bb * aa).sum()) * self.scale * other.scale


class LowRank(Delta):
    """Factors per tensor of the base."""

    kind = "lowrank"

    def __init__(self, base: Base, factors: dict[str, Factors], folder: Path | None = None):
        super().__init__(base)
        self.factors = factors
        self.folder = folder
        """The PEFT adapter folder this is, unchanged; None once arithmetic made it another."""

    @classmethod
    def load(cls, folder: Path, base: Base) -> LowRank:
        """Read a PEFT LoRA adapter; raises InputError naming what a low-rank sum cannot hold.

        Also raises InputError when the adapter does not fit the base's tensors.
        """
        with TensorFolder(base.folder) as tensors:
            return cls(base, read_factors(folder, tensors), folder)

    def names(self) -> list[str]:
        """Tensors with factors."""
        return sorted(self.factors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the base's tensor."""
        return self.factors[name].shape

    def to_dense(self, name: str) -> Tensor:
        """`scale * B @ A` in the base's layout, float32."""
        return self.factors[name].dense()

    def __mul__(self, factor: float) -> LowRank:
        scaled = {n: replace(f, scale=f.scale * factor) for n, f in self.factors.items()}
        return LowRank(self.base, scaled, self.folder if factor == 1.0 else None)

    def __add__(self, other: Delta) -> Delta:
        self.same_base(other)
        if not isinstance(other, LowRank):
            return Dense(self.base, ((1.0, self),)) + other
        both = {**self.factors, **other.factors}
        for name in self.factors.keys() & other.factors.keys():
            both[name] = self.factors[name].joined(other.factors[name])
        return LowRank(self.base, both)

    def dot(self, other: Delta) -> float:
        """Inner product; with another low-rank delta, through the factors."""
        if not isinstance(other, LowRank):
            return super().dot(other)
        self.same_base(other)
        shared = self.factors.keys() & other.factors.keys()
        return sum(self.factors[name].dot(other.factors[name]) for name in sorted(shared))

    def save(self, folder: Path) -> None:
        """Write a PEFT adapter folder; an adapter that arithmetic has not touched is copied."""
        folder.mkdir(parents=True, exist_ok=True)
        if self.folder is None:
            _write_adapter(folder, self.factors, self.base)
        elif self.folder.resolve() != folder.resolve():
            for name in (WEIGHTS, CONFIG):
                with new_file(folder / name) as temporary:
                    shutil.copyfile(self.folder / name, temporary)
        describe(folder, self.kind, self.base)

    def apply(self, base: Base) -> PreTrainedModel:
        """`base` with the adapter attached by PEFT.

        Adding it to the weights would be another model where modules are tied: an adapter on an
        embedding leaves the output head that shares its weight as it is.
        """
        from peft import PeftModel

        with tempfile.TemporaryDirectory() as scratch:
            folder = self.folder or Path(scratch)
            if self.folder is None:
                _write_adapter(folder, self.factors, self.base)
            return PeftModel.from_pretrained(base.load(), folder).eval()  # pyright: ignore


def read_factors(folder: Path, base: TensorFolder | None = None) -> dict[str, Factors]:
    """Factors by base tensor name of a PEFT LoRA adapter folder.

    Covers LoRA and rsLoRA with rank and alpha patterns, on linear, Conv1D and embedding modules.
    Raises InputError naming any other adapter kind, and with the tensors of a `base` when the
    adapter does not fit them.
    """
    config = _config(folder)
    if not (folder / WEIGHTS).is_file():
        raise InputError(f"{folder} has no {WEIGHTS}; copy the adapter again, as safetensors")
    tensors = TensorFolder(folder / WEIGHTS)
    sides: dict[str, dict[str, Tensor]] = {}
    tables: set[str] = set()
    for key in tensors:
        if COPIED.match(key):
            _check_copy(tensors, key, base)
            continue
        match = KEY.match(key)
        if match is None or len(tensors[key].shape) != 2:
            raise InputError(
                f"{folder / WEIGHTS}: tensor {key} is not a LoRA factor; "
                "merge the adapter with PEFT"
            )
        sides.setdefault(match["module"], {})[match["side"]] = tensors.read(key)
        if match["table"]:
            tables.add(match["module"])
    if not sides:
        raise InputError(f"{folder / WEIGHTS}: holds no LoRA factors; copy the adapter again")
    factors = {}
    for module, pair in sides.items():
        if set(pair) != {"A", "B"}:
            raise InputError(f"{folder / WEIGHTS}: module {module} lacks lora_A or lora_B")
        scale = _scaling(config, module, pair["A"].shape[0])
        transposed = module in tables or bool(config.get("fan_in_fan_out"))
        factors[f"{module}.weight"] = Factors(
            pair["A"], pair["B"], scale, transposed, module in tables
        )
    return factors if base is None else _fitted(folder, factors, base)


def _fitted(folder: Path, factors: dict[str, Factors], base: TensorFolder) -> dict[str, Factors]:
    """Factors in the layout of the base's tensors.

    The config's `fan_in_fan_out` is one flag for all modules and only true of the last that PEFT
    met, so an adapter on Conv1D and Linear modules is told apart by the base's shapes. Square
    modules are Conv1D where any other is.
    """
    shapes = {name: _base_shape(name, base) for name in factors}
    if not any(shapes.values()):
        raise InputError(
            f"{folder}: adapts {min(factors)} and nothing that {base.path} has; "
            "name the base that the adapter was trained on"
        )
    straight = {name: (own.b.shape[0], own.a.shape[1]) for name, own in factors.items()}
    # A head that the base ties to its embeddings has their shape and no tensor of its own.
    every = {entry.shape for entry in base.values()}
    for name, shape in shapes.items():
        alike = {straight[name], straight[name][::-1]} & every
        if shape is None and len(alike) == 1:
            (shapes[name],) = alike
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
    return factors


def _base_shape(name: str, base: Mapping[str, Any]) -> tuple[int, ...] | None:
    # Some checkpoints hold the bare model and lack its prefix ("transformer.").
    for known in (name, name.partition(".")[2]):
        if known in base:
            return base[known].shape
    return None


def _check_copy(tensors: TensorFolder, key: str, base: TensorFolder | None) -> None:
    name = COPIED.sub(r"\g<module>.weight", key)
    if base is None or name not in base:
        return
    copy, own = tensors.read(key), base.read(name)
    if copy.shape != own.shape or not copy.float().equal(own.float()):
        raise InputError(
            f"{tensors.path}: tensor {key} is not the base's {name}: the embeddings were resized "
            "or trained whole, which is no low-rank change; merge the adapter with PEFT"
        )


def _config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{folder} has no {CONFIG}: not an adapter folder") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path} line {error.lineno}: not JSON ({error.msg})") from None
    if not isinstance(config, dict):
        raise InputError(f"{path}: must be an object; copy the adapter again")
    if config.get("peft_type") != "LORA":
        raise InputError(f"{path}: adapter kind {config.get('peft_type')!r} is not low-rank (LORA)")
    for key, kind in REFUSED.items():
        if config.get(key):
            raise InputError(f"{path}: {kind} ({key}) is no low-rank change; merge it with PEFT")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(REBASING):
        raise InputError(
            f"{path}: init_lora_weights = {start!r} changes the base as well, so this is no "
            "low-rank change; convert it with PEFT's path_initial_model_for_weight_conversion"
        )
    if config.get("bias", "none") != "none":
        raise InputError(f"{path}: LoRA that trains biases (bias) is no low-rank change")
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


def _write_adapter(folder: Path, factors: dict[str, Factors], base: Base) -> None:
    from safetensors.torch import save_file

    if not factors:
        raise InputError(f"{folder}: the delta changes no tensor, so there is no adapter to write")
    tensors, ranks = {}, {}
    for name, own in factors.items():
        module = name.removesuffix(".weight")
        stem = f"base_model.model.{module}.lora_" + "embedding_" * own.table
        end = "" if own.table else ".weight"
        tensors[f"{stem}A{end}"] = own.a.float().contiguous()
        tensors[f"{stem}B{end}"] = (own.b.float() * own.scale).contiguous()
        ranks[module] = own.a.shape[0]
    top = max(ranks.values())
    others = {module: rank for module, rank in ranks.items() if rank != top}
    with new_file(folder / WEIGHTS) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.model,
        "inference_mode": True,
        "r": top,
        # alpha = r makes the scaling one: it is folded into B.
        "lora_alpha": top,
        "rank_pattern": others,
        "alpha_pattern": others,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(own.transposed and not own.table for own in factors.values()),
        "target_modules": sorted(ranks),
    }
    write_json(folder / CONFIG, config)
