"""What is merged, read in flat ranges: whole models, LoRA adapters, stored changes.

A `Source` opens one tensor of the base at a time as a `Part` that fills a block either with the
model's values or with its change. An adapter's change `scale * B @ A` (Hu et al. 2021, section 4.1;
rsLoRA: Kalajdzievski 2023) is computed for the asked range only and never stored.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from deltaloom.core.errors import InputError
from deltaloom.core.tensors import TensorEntry, TensorFolder
from deltaloom.merge._formats import FLOATS, same_bytes, same_numbers, widen

HEADS = ("lm_head.weight", "embed_out.weight")
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
LORA_KEY = re.compile(r"base_model\.model\.(.+)\.lora_(embedding_)?([AB])(?:\.weight)?$")

# Settings that do not touch the merged weight; any other setting that is on is refused by name.
# fmt: off
NEUTRAL = frozenset({
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path",
    "revision", "inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha",
    "lora_dropout", "fan_in_fan_out", "use_rslora", "layers_to_transform", "layers_pattern",
    "rank_pattern", "alpha_pattern", "megatron_core", "loftq_config", "eva_config",
    "corda_config", "lora_ga_config", "qalora_group_size", "runtime_config",
    "ensure_weight_tying",
})
# fmt: on
NAMES = {
    "use_dora": "DoRA",
    "lora_bias": "LoRA with a bias",
    "bias": "trained biases",
    "modules_to_save": "modules saved whole",
    "trainable_token_indices": "trained token rows",
    "target_parameters": "LoRA on parameters (target_parameters)",
    "layer_replication": "layer replication",
    "megatron_config": "Megatron layers",
    "alora_invocation_tokens": "activated LoRA",
}
PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal")
"""Starts that leave the base's weights as they are; PiSSA, OLoRA, LoftQ, CorDA shift them."""


class Part(Protocol):
    """One tensor of one source."""

    @property
    def gives_change(self) -> bool:
        """Whether `fill` gives the change over the base rather than the value."""
        ...

    @property
    def held(self) -> int:
        """Bytes that this took at most to open and keeps while it is read."""
        ...

    @property
    def path(self) -> Path:
        """Where it is from."""
        ...

    def fill(self, start: int, out: np.ndarray, scratch: np.ndarray) -> None:
        """out (n,) float = flat elements start..start+n; scratch is at least 8n bytes, uint8."""
        ...


class Source(Protocol):
    """A model, adapter or stored change over the base."""

    path: Path

    def check(self, base: TensorFolder) -> None:
        """Raise InputError unless this fits the base tensor by tensor."""
        ...

    def part(self, tensor: TensorEntry) -> Part | None:
        """This source's view of one tensor of the base; None when it leaves it unchanged."""
        ...


@dataclass(frozen=True)
class StoredPart:
    """A tensor that lies in a file."""

    folder: TensorFolder
    tensor: TensorEntry
    gives_change: bool = False
    held: int = 0

    @property
    def path(self) -> Path:
        """See Part."""
        return self.tensor.file.parent

    def fill(self, start: int, out: np.ndarray, scratch: np.ndarray) -> None:
        """See Part."""
        raw = scratch[: out.size * self.tensor.itemsize]
        self.read(start, raw)
        widen(raw, self.tensor.dtype, out)

    def read(self, start: int, raw: np.ndarray) -> None:
        """raw = the tensor's own bytes from flat element `start` on."""
        self.folder.read_into(self.tensor.name, start, raw)


@dataclass(frozen=True)
class ProductPart:
    """The change scale * left (rows, r) @ right (r, columns), rows x columns as the base has it."""

    left: np.ndarray
    right: np.ndarray
    scale: float
    path: Path
    gives_change: bool = True

    @property
    def held(self) -> int:
        """The factors in float32; as they are read also as bytes, and turned where stored so."""
        return 3 * (self.left.nbytes + self.right.nbytes)

    def fill(self, start: int, out: np.ndarray, scratch: np.ndarray) -> None:
        """See Part."""
        from deltaloom.merge import _kernels as kernels

        out[:] = 0
        kernels.add_product(self.left, self.right, start, np.float32(self.scale), out)


class ModelSource:
    """A whole model folder of the base's architecture."""

    def __init__(self, path: Path):
        self.path = path
        self.folder = TensorFolder(path)
        self.tied: dict[str, str] = {}

    def check(self, base: TensorFolder, moved: Collection[str] = ()) -> None:
        """See Source; a tied output layer may be stored on either side, and the tensors `moved` may
        have another number of rows.
        """
        for name, wanted in base.items():
            if name not in self.folder:
                self._tie(name, base)
            own = self.folder[self.tied.get(name, name)]
            if not fits(own, wanted, name in moved):
                raise InputError(
                    f"{self.path}: tensor {name!r} has shape {list(own.shape)}, the base "
                    f"{base.path} has {list(wanted.shape)}; merge models of one architecture and "
                    "one vocabulary"
                )
            if (own.dtype in FLOATS) != (wanted.dtype in FLOATS):
                raise InputError(
                    f"{self.path}: tensor {name!r} is {own.dtype}, in the base {wanted.dtype}"
                )
        for name in self.folder:
            stands_in = name in self.tied.values()
            if name not in base and not stands_in and not self._repeats_embedding(name):
                raise InputError(
                    f"{self.path} has tensor {name!r}, which the base {base.path} lacks"
                    + ("; untie the base's output layer first" if name.endswith(HEADS) else "")
                )

    def _tie(self, name: str, base: TensorFolder) -> None:
        embedding = _embedding(self.folder)
        tied = _json(self.path / "config.json").get("tie_word_embeddings", True)
        if not (name.endswith(HEADS) and tied and embedding):
            raise InputError(
                f"{self.path} has no tensor {name!r}, which the base {base.path} has; merge models "
                "of one architecture"
            )
        self.tied[name] = embedding

    def _repeats_embedding(self, name: str) -> bool:
        embedding = _embedding(self.folder)
        if not name.endswith(HEADS) or embedding is None:
            return False
        head, table = self.folder[name], self.folder[embedding]
        same_form = (head.shape, head.dtype) == (table.shape, table.dtype)
        return same_form and same_bytes(self.folder, name, self.folder, embedding)

    def part(self, tensor: TensorEntry) -> Part:
        """See Source."""
        return StoredPart(self.folder, self.folder[self.tied.get(tensor.name, tensor.name)])


class ChangeSource:
    """A folder with `delta.safetensors`: changes by the base's tensor names, the rest unchanged."""

    def __init__(self, path: Path):
        self.path = path
        self.folder = TensorFolder(path / "delta.safetensors")

    def check(self, base: TensorFolder) -> None:
        """See Source."""
        for name, own in self.folder.items():
            if name not in base or base[name].shape != own.shape or own.dtype not in FLOATS:
                raise InputError(
                    f"{self.path} changes {name!r}, {own.dtype} {list(own.shape)}, which the base "
                    f"{base.path} has not in that shape"
                )

    def part(self, tensor: TensorEntry) -> Part | None:
        """See Source."""
        own = self.folder.get(tensor.name)
        return None if own is None else StoredPart(self.folder, own, gives_change=True)


class AdapterSource:
    """A PEFT LoRA or rsLoRA adapter folder, with rank and alpha patterns, on linear, Conv1D
    (`fan_in_fan_out`) and embedding layers. Other kinds are refused by name.
    """

    def __init__(self, path: Path):
        self.path = path
        self.config = _json(path / "adapter_config.json")
        self.folder = TensorFolder(path)
        self._refuse()
        self.modules: dict[str, dict[str, str]] = {}
        self.copies: list[str] = []
        for key in self.folder:
            match = LORA_KEY.fullmatch(key)
            if match is None:
                self.copies.append(key)
                continue
            module, table, side = match.groups()
            self.modules.setdefault(module, {})[("table " if table else "") + side] = key
        self.targets: dict[str, str] = {}

    def _refuse(self) -> None:
        kind = self.config.get("peft_type")
        init = self.config.get("init_lora_weights", True)
        refused = None
        if kind != "LORA":
            refused = f"{kind} adapters"
        elif init not in PLAIN_INITS:
            refused = f"LoRA started by {init!r}, which shifts the base's weights,"
        for key, value in self.config.items():
            if key not in NEUTRAL and key != "init_lora_weights" and value not in (None, "none"):
                refused = (refused or NAMES.get(key, key)) if value else refused
        if refused:
            raise InputError(
                f"{self.path}: {refused} cannot be merged as it is; merge the adapter into its "
                "model with PEFT's merge_and_unload and give that model's folder"
            )

    def check(self, base: TensorFolder) -> None:
        """See Source; an embedding tied to the output layer is refused: both would change."""
        tied = _json(base.path / "config.json").get("tie_word_embeddings", False)
        embedding = _embedding(base)
        heads = [name for name in base if name.endswith(HEADS)]
        for module in self.modules:
            name = self._tensor(module, base)
            if tied and not heads and name == embedding:
                raise InputError(
                    f"{self.path} changes {name!r}, which the base {base.path} also uses as its "
                    "output layer (tied); untie the base first"
                )
            left, right, _ = self._factors(module)
            shape = (left.shape[0], right.shape[1])
            if shape != base[name].shape:
                raise InputError(
                    f"{self.path}: the change of {name!r} has shape {list(shape)}, the base "
                    f"{base.path} has {list(base[name].shape)}"
                )
            self.targets[name] = module
        for key in self.copies:  # PEFT stores the embedding beside its factors
            module = key.removeprefix("base_model.model.").removesuffix(".weight")
            name = self._tensor(module.removesuffix(".base_layer"), base)
            if not same_numbers(self.folder, key, base, name):
                raise InputError(
                    f"{self.path} brings its own {name!r}, which differs from the base "
                    f"{base.path}'s; only LoRA factors can be merged"
                )

    def _tensor(self, module: str, base: TensorFolder) -> str:
        # Checkpoints may omit leading parts of a module's path, e.g. `transformer.` in GPT-2.
        parts = module.split(".")
        for skip in range(len(parts)):
            name = ".".join(parts[skip:]) + ".weight"
            if name in base:
                return name
        raise InputError(
            f"{self.path} changes module {module!r}, but the base {base.path} has no tensor "
            f"{module + '.weight'!r}"
        )

    def _factors(self, module: str) -> tuple[TensorEntry, TensorEntry, bool]:
        """Entries of B and A, or of A' and B' where the base stores the weight transposed."""
        keys = self.modules[module]
        table = "table A" in keys or "table B" in keys
        if set(keys) != ({"table A", "table B"} if table else {"A", "B"}):
            raise InputError(f"{self.path}: module {module!r} has only one of lora_A and lora_B")
        b, a = (self.folder[keys[("table " if table else "") + side]] for side in "BA")
        if len(a.shape) != 2 or len(b.shape) != 2:
            raise InputError(f"{self.path}: module {module!r} is no linear layer or embedding")
        if table or self.config.get("fan_in_fan_out"):
            return _flipped(a), _flipped(b), True
        return b, a, False

    def part(self, tensor: TensorEntry) -> Part | None:
        """See Source."""
        module = self.targets.get(tensor.name)
        if module is None:
            return None
        left, right, flipped = self._factors(module)
        factors = [self._matrix(entry, flipped) for entry in (left, right)]
        scale = self._scale(module, right.shape[0])
        return ProductPart(*factors, scale=scale, path=self.path)

    def _matrix(self, entry: TensorEntry, flipped: bool) -> np.ndarray:
        out = np.empty(entry.count, np.float32)
        widen(self.folder.raw(entry.name), entry.dtype, out)
        if flipped:
            return np.ascontiguousarray(out.reshape(entry.shape[::-1]).T)
        return out.reshape(entry.shape)

    def _scale(self, module: str, rank: int) -> float:
        patterns: dict[str, float] = self.config.get("alpha_pattern") or {}
        alpha = float(self.config.get("lora_alpha", 8))
        for key, value in patterns.items():
            if re.match(rf"(.*\.)?({key})$", module):
                alpha = float(value)
                break
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)


def open_source(path: str | Path) -> Source:
    """The source in a local folder: an adapter, stored changes or a whole model.

    Raises InputError when the folder is none of these.
    """
    path = Path(path)
    if (path / "adapter_config.json").is_file():
        return AdapterSource(path)
    if (path / "delta.safetensors").is_file():
        return ChangeSource(path)
    return ModelSource(path)


def fits(own: TensorEntry, wanted: TensorEntry, moved: bool) -> bool:
    """Whether the shapes are equal, of a tensor that is moved but for the number of rows."""
    skipped = int(moved)
    return len(own.shape) == len(wanted.shape) and own.shape[skipped:] == wanted.shape[skipped:]


def _flipped(entry: TensorEntry) -> TensorEntry:
    return TensorEntry(entry.name, entry.dtype, entry.shape[::-1], entry.file, entry.offset)


def _embedding(folder: TensorFolder) -> str | None:
    found = [name for name in folder if name.endswith(EMBEDDINGS)]
    return found[0] if len(found) == 1 else None


def _json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError:
        raise InputError(f"{file} is not JSON") from None
    return value if isinstance(value, dict) else {}
