"""How it was run: inputs with hashes, versions, the recipe and the commands that replay it."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Any

from deltaloom.report.reading import INPUTS, Report, RunView, Step

UNSAID = ("name", "method", "base", "seed", *INPUTS)
"""Settings that stand in other columns."""


@dataclass(frozen=True)
class Input:
    """One base or data input."""

    kind: str
    name: str
    hash: str
    steps: tuple[str, ...]


@dataclass(frozen=True)
class Replay:
    """One run's recipe and commands."""

    name: str
    started: str
    recipe: str
    commands: str


def inputs(report: Report) -> list[Input]:
    """Bases and data by content hash, each once, with the steps that read them."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for step in report.steps:
        for key, value in step.record.get("inputs", {}).items():
            kind, _, name = str(key).partition(" ")
            place = (kind, name or step.base or "", str(value))
            found.setdefault(place, []).append(report.label(step))
    return [Input(*place, tuple(steps)) for place, steps in found.items()]


def versions(report: Report) -> list[tuple[str, str]]:
    """Package versions; several where runs differ."""
    found: dict[str, list[str]] = {}
    for record in [run.record for run in report.runs] + [step.record for step in report.steps]:
        for package, version in record.get("versions", {}).items():
            seen = found.setdefault(str(package), [])
            if str(version) not in seen:
                seen.append(str(version))
    return [(package, " and ".join(seen)) for package, seen in found.items()]


def settings(step: Step) -> list[tuple[str, str]]:
    """The method's settings and the step's notes as text."""
    own = {key: value for key, value in step.settings.items() if key not in UNSAID}
    notes = {f"{key} (noted)": value for key, value in step.record.get("notes", {}).items()}
    return [(key, _text(value)) for key, value in {**own, **notes}.items()]


def reads(step: Step) -> list[tuple[str, str]]:
    """What a step takes in, names without their folders."""
    found = [(key, ", ".join(last(name) for name in step.names(key))) for key in INPUTS]
    return [(key, text) for key, text in found if text]


def last(name: str) -> str:
    """The last part of a local path; hub ids stay as they are."""
    return name.rstrip("/").rpartition("/")[2] if name.startswith(("/", ".", "~")) else name


def replays(report: Report) -> list[Replay]:
    """Recipe text and commands of each run."""
    return [
        Replay(run.name, str(run.record.get("started", "")), _recipe(run), _commands(run))
        for run in report.runs
    ]


def _recipe(run: RunView) -> str:
    path = run.folder / "recipe.yaml"
    if path.exists():
        return path.read_text(encoding="utf-8", errors="replace")
    import yaml

    return yaml.safe_dump(run.record.get("recipe", {}), sort_keys=False, allow_unicode=True)


def _commands(run: RunView) -> str:
    recipe = shlex.quote(str(run.folder / "recipe.yaml"))
    out = shlex.quote(str(run.folder))
    again = shlex.quote(f"{run.folder}-again")
    lines = [f"deltaloom run {recipe} out={again}"]
    if run.status != "done":
        lines.insert(0, f"deltaloom run {recipe} out={out}  # takes it up where it stopped")
    if run.recipe:
        lines += [f"deltaloom compare {out} {again}", f"deltaloom report {again}"]
    return "\n".join(lines)


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(inner)}" for key, inner in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(_text(one) for one in value) or "none"
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "unset"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)
