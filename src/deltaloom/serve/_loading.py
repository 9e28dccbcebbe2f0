"""From a delta's folder to a task: what of it shares the base's batch, and what is a model beside.

- Low-rank changes (LoRA, rsLoRA, DoRA) and virtual tokens (soft prompts, prefixes) leave the base's
  weights alone, so they share its batch.
- Everything else (whole models, dense and sparse changes, traces, LoRA with biases or modules held
  whole or on embeddings, routed and bottleneck adapters) is a model of its own with batches of its
  own; tensors that are equal to the base's are held once.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deltaloom.core.base import Base
from deltaloom.core.delta import Delta, load
from deltaloom.core.deltas.lowrank import LowRank
from deltaloom.core.deltas.prompt import Prompt
from deltaloom.core.tensors import TensorFolder
from deltaloom.serve._cache import Prefix
from deltaloom.serve._forward import RaggedModel
from deltaloom.serve._stack import AdapterStack

STORED = ("adapter_config.json", "trace.safetensors", "delta.safetensors")
"""Files that say that a folder is no whole model."""
WRAPPED = re.compile(r"\.(base_layer|original_module)\.")
"""What PEFT puts into the names of the base's tensors."""


@dataclass(frozen=True)
class Found:
    """What a folder holds, before any model has it."""

    kind: str
    """`lowrank`, `prompt`, or of a model of its own what it is (`model`, `sparse`, ...)."""
    delta: Delta | None
    """None for a whole model."""
    folder: Path

    @property
    def shares(self) -> bool:
        """Whether it shares the base's batch."""
        return self.kind in ("lowrank", "prompt")


def find(name: str, base: Base) -> Found:
    """Read a folder or hub repository; touches no model, so any thread may.

    Raises InputError when it is no delta over `base`, nor a model.
    """
    folder = base.model_copy(update={"model": name, "revision": None}).folder
    whole = (folder / "config.json").exists() and not any((folder / f).exists() for f in STORED)
    if whole:
        return Found("model", None, folder)
    delta = load(folder, base)
    if isinstance(delta, LowRank):
        alone = bool(delta.rest.names()) or any(own.table for own in delta.factors.values())
        return Found("lowrank with whole tensors" if alone else "lowrank", delta, folder)
    return Found(delta.kind, delta, folder)


def attach(found: Found, key: str, stack: AdapterStack, base: Base) -> None:
    """Put low-rank factors into the stack; the worker's thread does."""
    assert isinstance(found.delta, LowRank)
    if any(own.magnitude is not None for own in found.delta.factors.values()):
        with TensorFolder(base.folder) as stored:
            stack.add(key, found.delta.factors, stored.read)
    else:
        stack.add(key, found.delta.factors, None)


def virtual_tokens(found: Found, ragged: RaggedModel) -> Prefix:
    """Keys and values of a soft prompt or prefix; the worker's thread computes them.

    Virtual tokens see nothing but each other, so what a layer keeps of them never changes.
    """
    from peft import PeftModel

    assert isinstance(found.delta, Prompt)
    wrapped: Any = PeftModel.from_pretrained(ragged.model, found.folder).eval()  # pyright: ignore
    prompt = wrapped.get_prompt(1)
    if isinstance(prompt, torch.Tensor):
        return ragged.computed_prefix(prompt[0])
    kept = prompt.self_attention_cache if hasattr(prompt, "self_attention_cache") else prompt
    like = {"dtype": ragged.model.dtype, "device": ragged.device}
    return [
        (one.keys[0].transpose(0, 1).to(**like), one.values[0].transpose(0, 1).to(**like))
        for one in kept.layers
    ]


def own_model(found: Found, base: Base, shared: Any, rows: int) -> tuple[RaggedModel, Any]:
    """A model of its own and its tokenizer; the worker's thread loads it.

    What is equal in `shared`, the base's loaded model, is held once. Raises InputError when it
    cannot be served.
    """
    if found.delta is None:
        own = base.model_copy(update={"model": str(found.folder), "revision": None})
        model, tokenizer = own.load(), own.tokenizer()
    else:
        model, tokenizer = found.delta.apply(base), found.delta.tokenizer(base)
    share(model, shared)
    ragged = RaggedModel(model, str(found.folder), rows)
    ragged.check()
    return ragged, tokenizer


def share(model: Any, shared: Any) -> int:
    """Let `model` hold the tensors of `shared` where its own are equal; bytes saved."""
    held = {name: tensor for name, tensor in _tensors(shared)}
    saved = 0
    for name, tensor in _tensors(model):
        twin = held.get(name)
        if twin is None or twin.data_ptr() == tensor.data_ptr():
            continue
        alike = [(one.shape, one.dtype, one.device) for one in (twin, tensor)]
        if alike[0] == alike[1] and torch.equal(twin, tensor):
            tensor.data = twin.data
            saved += twin.nbytes
    return saved


def resident_bytes(models: list[Any]) -> int:
    """Bytes of all tensors of some models, each counted once."""
    seen = {tensor.data_ptr(): tensor.nbytes for model in models for _, tensor in _tensors(model)}
    return sum(seen.values())


def _tensors(model: Any) -> list[tuple[str, torch.Tensor]]:
    """Parameters by the names that they have without adapters."""
    return [
        (WRAPPED.sub(".", name.removeprefix("base_model.model.")), tensor)
        for name, tensor in model.named_parameters()
    ]
