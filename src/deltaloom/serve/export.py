"""A launch file for another engine that serves the same tasks: vLLM, or `transformers serve`.

vLLM (0.9 and later) serves one model and LoRA adapters of it; it refuses DoRA and modules saved
whole, and does not read ranks or alphas by pattern. `transformers serve` (5.23) loads whole models
by their folders and no adapters, so each delta is merged into a model first. Neither routes.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from deltaloom.core.atomic import write_text
from deltaloom.core.base import Base
from deltaloom.core.deltas._reading import adapter_config
from deltaloom.core.deltas.lowrank import LowRank
from deltaloom.core.errors import InputError
from deltaloom.serve._loading import Found, find
from deltaloom.serve.settings import KEY, Serving

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM's --max-lora-rank takes."""
MERGED = ("lowrank", "lowrank with whole tensors", "dense", "sparse", "trace")
"""Kinds that `deltaloom merge` makes a model of."""
ENGINES = ("vllm", "transformers")


def export(engine: str, settings: Serving, out: Path) -> Path:
    """Write the launch file, executable; returns its path.

    Raises InputError for an engine that is not known and for a task that it cannot serve.
    """
    if engine not in ENGINES:
        raise InputError(f"--export {engine}: must be one of {', '.join(ENGINES)}")
    settings = settings.checked()
    if settings.router is not None:
        raise InputError(f"router: {engine} does not route by content; leave it out and name tasks")
    found = {name: find(source, settings.base) for name, source in settings.deltas.items()}
    lines = (_vllm if engine == "vllm" else _transformers)(settings, found)
    head = [
        "#!/usr/bin/env bash",
        f"# Written by deltaloom serve --export {engine}; more options may follow on its command.",
        "set -euo pipefail",
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, "\n".join([*head, *lines]) + "\n")
    out.chmod(0o755)
    return out


def _vllm(settings: Serving, found: dict[str, Found]) -> list[str]:
    for name, one in found.items():
        _check_vllm(name, one)
    command = ["vllm", "serve", *_model(settings.base)]
    command += ["--served-model-name", settings.base_name]
    command += ["--host", settings.host, "--port", str(settings.port)]
    if found:
        modules = [f"{name}={one.folder.resolve()}" for name, one in found.items()]
        rank = max(_rank(one) for one in found.values())
        fitting = min(size for size in RANKS if size >= rank)
        command += ["--enable-lora", "--max-loras", str(len(found))]
        command += ["--max-lora-rank", str(fitting), "--lora-modules", *modules]
    # A server that others reach does not start without its key.
    key = f'--api-key "${{{KEY}:?set it}}"'
    if settings.is_loopback:
        key = f'${{{KEY}:+--api-key "${KEY}"}}'
    return [f'exec {shlex.join(command)} {key} "$@"']


def _check_vllm(name: str, one: Found) -> None:
    delta = one.delta
    if one.kind != "lowrank" or not isinstance(delta, LowRank):
        raise InputError(
            f"{name}: vLLM serves LoRA adapters, and this is {one.kind}; serve it as a model of "
            "its own, merged where it is a delta"
        )
    config = adapter_config(one.folder)
    if config.get("use_dora"):
        raise InputError(f"{name}: vLLM does not serve DoRA; merge it into a model first")
    for key in ("rank_pattern", "alpha_pattern"):
        if config.get(key):
            raise InputError(f"{name}: vLLM does not read {key}; merge it into a model first")
    if _rank(one) > RANKS[-1]:
        raise InputError(f"{name}: its rank {_rank(one)} is more than vLLM's {RANKS[-1]}; cut it")


def _rank(one: Found) -> int:
    assert isinstance(one.delta, LowRank)
    return max(own.a.shape[0] for own in one.delta.factors.values())


def _transformers(settings: Serving, found: dict[str, Found]) -> list[str]:
    if not settings.is_loopback:
        raise InputError(
            f"host = {settings.host!r}: transformers serve checks no key; listen on 127.0.0.1 and "
            "put a proxy that does in front"
        )
    base = settings.base
    lines = ["# Requests name a model by its folder, relative to this file:"]
    merges = []
    for name, one in found.items():
        if one.delta is None:
            lines.append(f"#   {one.folder.resolve()}")
            continue
        if one.kind not in MERGED:
            raise InputError(
                f"{name}: transformers serve has whole models, and {one.kind} makes none"
            )
        lines.append(f"#   models/{name}")
        merges.append(
            shlex.join(
                [
                    "deltaloom", "merge", "task_arithmetic", f"base={_place(base)}",
                    f"deltas=[{one.folder.resolve()}]", "form=model", f"out=models/{name}",
                ]
            )
        )  # fmt: skip
    lines.append(f"#   {_place(base)}")
    command = ["transformers", "serve", "--host", settings.host, "--port", str(settings.port)]
    command += [] if base.dtype == "auto" else ["--dtype", base.dtype]
    command += ["--trust-remote-code"] if base.trust_remote_code else []
    return [*lines, 'cd "$(dirname "$0")"', *merges, f'exec {shlex.join(command)} "$@"']


def _model(base: Base) -> list[str]:
    words = [_place(base)]
    words += ["--revision", base.revision] if base.revision else []
    words += ["--dtype", base.dtype] if base.dtype != "auto" else []
    return words + (["--trust-remote-code"] if base.trust_remote_code else [])


def _place(base: Base) -> str:
    """A local folder from anywhere, or the hub's id."""
    path = Path(base.model).expanduser()
    return str(path.resolve()) if path.is_dir() else base.model
