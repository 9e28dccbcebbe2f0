"""The model card of a tuned or merged folder: base, data, recipe, estimates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from deltaloom.core.atomic import write_text
from deltaloom.core.deltas.sparse import is_sparse


def write_card(
    folder: Path,
    step: dict[str, Any],
    about: dict[str, Any],
    estimates: dict[str, dict[str, Any]] | None = None,
) -> None:
    """Write `README.md` with the hub's front matter.

    `step` is the recorded step, `about` what is known of base and data, `estimates` what was
    measured of this folder, by task and metric. Times are left out: the same work gives the same
    bytes.
    """
    ((verb, settings),) = step.items()
    adapter = (folder / "adapter_config.json").exists()
    front = {
        "base_model": about["base"],
        "library_name": "peft" if adapter else "transformers",
        "tags": ["deltaloom", verb, settings["method"]],
    }
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False).strip(),
        "---",
        "",
        f"# {settings['name']}",
        "",
        f"A {_kind(folder) if adapter else 'model made from'} `{about['base']}` "
        f"(weights `{about['fingerprint']}`) by `deltaloom {verb} {settings['method']}`.",
        "",
        *_data(about.get("sources")),
        *_estimates(estimates or {}),
        "## Recipe",
        "",
        "```yaml",
        yaml.safe_dump({"steps": [step]}, sort_keys=False).strip(),
        "```",
        "",
    ]
    write_text(folder / "README.md", "\n".join(lines))


def _kind(folder: Path) -> str:
    if is_sparse(folder):
        return "sparse adapter (`import deltaloom.core.adapters.sparse` before PEFT loads it) for"
    return "LoRA adapter for"


def _data(sources: dict[str, int] | None) -> list[str]:
    if not sources:
        return []
    rows = [f"| {name} | {count} |" for name, count in sorted(sources.items())]
    return ["## Data", "", "| source | rows |", "|---|---|", *rows, ""]


def _estimates(estimates: dict[str, dict[str, Any]]) -> list[str]:
    if not estimates:
        return []
    rows = [
        f"| {key} | {one['value']:.4g} | {_interval(one)} | {one['n']} |"
        for key, one in sorted(estimates.items())
    ]
    head = ["## Estimates", "", "| what | value | 95 % interval | n |", "|---|---|---|---|"]
    return [*head, *rows, ""]


def _interval(one: dict[str, Any]) -> str:
    if one["low"] is None or one["high"] is None:
        return "unknown"
    return f"{one['low']:.4g} to {one['high']:.4g}"
