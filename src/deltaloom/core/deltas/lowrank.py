"""Low-rank deltas: PEFT LoRA adapters, on disk unchanged, as exact vectors in memory.

A change is `factor * scaling * B @ A` per module, with scaling alpha / r (LoRA, Hu et al. 2021,
section 4.1) or alpha / sqrt(r) (rsLoRA, Kalajdzievski 2023). Sums concatenate the factors, so they
stay exact and low-rank; nothing is densified until `to_dense` asks for one tensor.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltaloom.core.base import Base
from deltaloom.core.delta import Delta, describe
from deltaloom.core.deltas.dense import Dense, add_to_model
from deltaloom.core.errors import InputError
from deltaloom.core.tensors import TensorFolder

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KEY = re.compile(r"^base_model\.model\.(?P<module>.+)\.lora_(?P<table>embedding_)?(?P<side>[AB])")
REFUSED = {
    "use_dora": "DoRA",
    "lora_bias": "LoRA with bias",
    "modules_to_save": "modules saved whole",
    "trainable_token_indices": "trained token rows",
    "megatron_config": "Megatron layers",
}


@dataclass(frozen=True)
class Factors:
    """One module's change `scale * B @ A`, transposed when the base stores its weight so."""

    a: Tensor
    """(r, in)"""
    b: Tensor
    """(out, r)"""
    scale: float
    transposed: bool = False

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

        mine, theirs = self.b.float() * self.scale, other.b.float() * other.scale
        a = torch.cat([self.a.float(), other.a.float()])  # (r1 + r2, in)
        return Factors(a, torch.cat([mine, theirs], dim=1), 1.0, self.transposed)

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
        """Read a PEFT LoRA adapter; raises InputError naming what a low-rank sum cannot hold."""
        return cls(base, read_factors(folder), folder)

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
        if self.folder is not None:
            for name in (CONFIG, WEIGHTS):
                shutil.copyfile(self.folder / name, folder / name)
        else:
            _write_adapter(folder, self.factors, self.base)
        describe(folder, self.kind, self.base)

    def apply(self, base: Base) -> PreTrainedModel:
        """`base` with the adapter: attached by PEFT when it is one on disk, else added in."""
        if self.folder is None:
            return add_to_model(base, self)
        from peft import PeftModel

        return PeftModel.from_pretrained(base.load(), self.folder).eval()  # pyright: ignore


def read_factors(folder: Path) -> dict[str, Factors]:
    """Factors by base tensor name of a PEFT LoRA adapter folder.

    Covers LoRA and rsLoRA with rank and alpha patterns, on linear, Conv1D and embedding modules.
    Raises InputError naming any other adapter kind.
    """
    config = _config(folder)
    tensors = TensorFolder(folder / WEIGHTS)
    sides: dict[str, dict[str, Tensor]] = {}
    tables: set[str] = set()
    for key in tensors:
        match = KEY.match(key)
        if match is None:
            raise InputError(f"{folder / WEIGHTS}: tensor {key} is not a LoRA factor")
        sides.setdefault(match["module"], {})[match["side"]] = tensors.read(key)
        if match["table"]:
            tables.add(match["module"])
    factors = {}
    for module, pair in sides.items():
        if set(pair) != {"A", "B"}:
            raise InputError(f"{folder / WEIGHTS}: module {module} lacks lora_A or lora_B")
        scale = _scaling(config, module, pair["A"].shape[0])
        transposed = module in tables or bool(config.get("fan_in_fan_out"))
        factors[f"{module}.weight"] = Factors(pair["A"], pair["B"], scale, transposed)
    return factors


def _config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{folder} has no {CONFIG}: not an adapter folder") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path} line {error.lineno}: not JSON ({error.msg})") from None
    if config.get("peft_type") != "LORA":
        raise InputError(f"{path}: adapter kind {config.get('peft_type')!r} is not low-rank (LORA)")
    for key, kind in REFUSED.items():
        if config.get(key):
            raise InputError(f"{path}: {kind} ({key}) is no low-rank change; merge it with PEFT")
    if config.get("bias", "none") != "none":
        raise InputError(f"{path}: LoRA that trains biases (bias) is no low-rank change")
    return config


def _scaling(config: dict[str, Any], module: str, rank: int) -> float:
    alpha = _by_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", rank))
    return alpha / rank**0.5 if config.get("use_rslora") else alpha / rank


def _by_pattern(patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
    # PEFT's rule: the first pattern that matches the whole end of the module's dotted name.
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _write_adapter(folder: Path, factors: dict[str, Factors], base: Base) -> None:
    from safetensors.torch import save_file

    from deltaloom.core.atomic import write_json

    tensors, ranks = {}, {}
    for name, own in factors.items():
        module = name.removesuffix(".weight")
        stem = f"base_model.model.{module}.lora_"
        tensors[f"{stem}A.weight"] = own.a.float().contiguous()
        tensors[f"{stem}B.weight"] = (own.b.float() * own.scale).contiguous()
        ranks[module] = own.a.shape[0]
    top = max(ranks.values())
    others = {module: rank for module, rank in ranks.items() if rank != top}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
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
        "fan_in_fan_out": any(own.transposed for own in factors.values()),
        "target_modules": sorted(ranks),
    }
    write_json(folder / CONFIG, config)
