"""Prompts to begin from: one that is named, or what SPoT retrieves from a library of them.

A task's embedding is its prompt; tasks are as similar as their prompts (Vu et al. 2022, section 4).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from deltaloom.core.atomic import new_folder, write_json
from deltaloom.core.delta import ADAPTERS, adapter_kind, load
from deltaloom.core.deltas.prompt import CONFIG, Prompt
from deltaloom.core.errors import InputError

if TYPE_CHECKING:
    from deltaloom.core.base import Base

PROMPT = "prompt_embeddings"
"""PEFT's name of an adapter's virtual tokens."""


class Retrieved(NamedTuple):
    """A prompt to begin from, and how it was found."""

    prompt: Tensor
    """(k, d)"""
    record: dict[str, Any]
    """Every source's similarity, what was taken at which weight, and losses where they decided."""


def read_prompt(key: str, name: str, base: Base, kind: str, length: int) -> Tensor:
    """The virtual tokens of the adapter folder `name`, float32 `(length, d)`.

    Raises InputError, saying that setting `key` named it, for a delta of another base, one that is
    no prompt, another `kind` (PEFT's name) of prompt and another length.
    """
    delta = load(name, base)
    if not isinstance(delta, Prompt) or delta.names() != [PROMPT]:
        raise InputError(
            f"{key}: {name} holds a {delta.kind} delta and not one prompt; name a folder that "
            "tune prompt wrote"
        )
    found = adapter_kind(delta.like)
    if found != kind:
        called = ADAPTERS[str(found)].called
        raise InputError(f"{key}: {name} is a {called}, not a {ADAPTERS[kind].called}; change form")
    tokens = delta.shape(PROMPT)[0]
    if tokens != length:
        raise InputError(
            f"{key}: {name} has {tokens} virtual tokens, not {length}; set virtual_tokens={tokens}"
        )
    return delta.to_dense(PROMPT)


def read_library(names: Sequence[str], base: Base, kind: str, length: int) -> dict[str, Tensor]:
    """The prompts of `names` by their folders: prompts, or folders that hold prompts of `kind`.

    Raises InputError as `read_prompt` does, for a folder that holds none, and for two prompts of
    unequal width.
    """
    folders: list[str] = []
    for name in names:
        home = Path(name).expanduser()
        if not home.is_dir() or (home / CONFIG).exists():
            folders.append(name)
            continue
        inside = [str(path) for path in sorted(home.iterdir()) if adapter_in(path) == kind]
        if not inside:
            raise InputError(f"library: {name} holds no folder of a {ADAPTERS[kind].called}")
        folders += inside
    found = {name: read_prompt("library", name, base, kind, length) for name in folders}
    if len({prompt.shape for prompt in found.values()}) > 1:
        raise InputError("library: its prompts are of different bases; keep those of one base")
    return found


def adapter_in(folder: Path) -> str | None:
    """PEFT's name of the adapter in `folder`; None where there is none."""
    return adapter_kind(folder) if folder.is_dir() else None


def similarity(one: Tensor, other: Tensor, by: Literal["average", "token"] = "average") -> float:
    """Cosine of two prompts `(k, d)`, `(l, d)`, in float64.

    `average` compares the averages of their tokens, `token` averages over all pairs of tokens.
    """
    one, other = one.double(), other.double()
    if by == "token":  # the mean over pairs of unit vectors is the product of their means
        unit = [functional.normalize(prompt, dim=1).mean(0) for prompt in (one, other)]
        return float(unit[0] @ unit[1])
    return float(functional.cosine_similarity(one.mean(0), other.mean(0), dim=0))


def retrieve(
    task: Tensor,
    sources: Mapping[str, Tensor],
    *,
    by: Literal["average", "token"],
    how: Literal["best", "mean"],
    top: int,
    loss: Callable[[Tensor], float],
) -> Retrieved:
    """What a task with the embedding `task` should begin from.

    Of the `top` most similar sources, `best` takes the one of least `loss` and `mean` the mean
    weighted by similarity. Raises InputError when no source has a weight above zero.
    """
    found = {name: similarity(task, prompt, by) for name, prompt in sources.items()}
    nearest = sorted(found, key=lambda name: (-found[name], name))[:top]
    record: dict[str, Any] = {"similarities": found}
    if how == "mean":
        taken = {name: found[name] for name in nearest if found[name] > 0}
        if not taken:
            raise InputError("library: no prompt in it is similar to the task's; use retrieve=best")
        weights = {name: value / sum(taken.values()) for name, value in taken.items()}
    else:
        if len(nearest) > 1:
            record["losses"] = {name: loss(sources[name]) for name in nearest}
            nearest.sort(key=lambda name: record["losses"][name])
        weights = {nearest[0]: 1.0}
    prompt = sum(
        (weight * sources[name].double() for name, weight in weights.items()), torch.zeros(())
    )
    return Retrieved(prompt.float(), {**record, "weights": weights})


def kept(folder: Path, make: Callable[[], Retrieved]) -> Retrieved:
    """What `make` gives, read from `folder` when an earlier attempt has been there."""
    if not folder.exists():
        with new_folder(folder) as scratch:
            prompt, record = make()
            save_file({PROMPT: prompt.contiguous()}, scratch / "prompt.safetensors")
            write_json(scratch / "record.json", record)
    record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    return Retrieved(load_file(folder / "prompt.safetensors")[PROMPT], record)
