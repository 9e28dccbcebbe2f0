"""Commands that look and change nothing: ls, show, schema, env, compare, check."""

from __future__ import annotations

import ast
import json as jsonlib
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer

from deltaloom.core.errors import InputError, suggest
from deltaloom.core.registry import VERBS, Entry, methods
from deltaloom.core.spec import explain

Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]


def ls(
    verb: Annotated[str | None, typer.Argument(help="A verb, as select or tune.")] = None,
    json: Json = False,
) -> None:
    """List the methods of a verb, or of all."""
    entries = methods(verb)
    if json:
        rows = [
            {"verb": e.verb, "name": e.name, "summary": e.summary, "paper": e.paper}
            for e in entries
        ]
        print(jsonlib.dumps(rows))
        return
    for entry in entries:
        print(f"{entry.verb:8} {entry.name:16} {entry.summary}")


def show(
    method: Annotated[str, typer.Argument(help="A method, or VERB.METHOD.")], json: Json = False
) -> None:
    """Explain a method: what it does, its paper, its settings with defaults."""
    entry = _find(method)
    cls = entry.load()
    rows = [
        {
            "name": name,
            "default": entry.preset.get(name, field.get_default(call_default_factory=True)),
            "type": _type_name(field.annotation),
            "help": explain(cls, name),
        }
        for name, field in sorted(
            cls.model_fields.items(), key=lambda item: item[0] not in cls.__annotations__
        )  # what the method itself adds comes before what its verb has
    ]
    if json:
        facts = {"verb": entry.verb, "name": entry.name, "paper": entry.paper, "settings": rows}
        print(jsonlib.dumps(facts, default=lambda value: value.model_dump()))
        return
    print(f"{entry.verb} {entry.name}\n\n{entry.summary}\n")
    print(_module_doc(entry))
    print("\nSettings")
    for row in rows:
        print(f"  {row['name']} = {row['default']}  ({row['type']})\n      {row['help']}")


def schema() -> None:
    """JSON schema of recipes, for completion in editors."""
    from deltaloom.recipe.schema import recipe_schema

    # Indented, it would be twice as long and take twice as long to write; editors do not mind.
    print(jsonlib.dumps(recipe_schema()))


def env(json: Json = False) -> None:
    """Versions, cores, memory and devices, for bug reports."""
    import os
    import platform

    import torch

    from deltaloom.core.run import versions

    facts: dict[str, Any] = {
        **versions(),
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "cuda": [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())],
    }
    if json:
        print(jsonlib.dumps(facts))
        return
    for key, value in facts.items():
        print(f"{key:14} {value}")


def compare(
    first: Annotated[str, typer.Argument(metavar="RUN[,RUN...]", help="A run that measured.")],
    second: Annotated[str, typer.Argument(metavar="RUN[,RUN...]", help="What to compare it with.")],
    json: Json = False,
) -> None:
    """Compare two runs' estimates item by item: first minus second, per task and metric.

    Several runs with commas between are training seeds of one thing, the k-th of the first with
    the k-th of the second: interval and verdict then speak of new seeds and new items.
    """
    from deltaloom.recipe.comparing import compared

    found = compared(first, second)
    if json:
        print(jsonlib.dumps({key: one.to_json() for key, one in found.items()}))
        return
    for line in found.values():
        print(line)


def check(
    path: Annotated[Path, typer.Argument(help="A model, adapter, features, run folder or data.")],
    json: Json = False,
) -> None:
    """Check that a folder or file is whole; says what it is."""
    from deltaloom.recipe.inspection import inspect

    facts = inspect(path)
    if json:
        print(jsonlib.dumps(facts))
        return
    print(f"{path}: {facts.pop('kind')}, whole")
    for key, value in facts.items():
        print(f"  {key}: {value}")


def _find(name: str) -> Entry:
    verb, dot, rest = name.partition(".")
    wanted = rest if dot else name
    among = methods(verb if dot else None)
    found = [entry for entry in among if entry.name == wanted]
    if len(found) > 1:
        listed = ", ".join(f"{entry.verb}.{entry.name}" for entry in found)
        raise InputError(f"several methods are called {name!r}: {listed}")
    if not found and name in VERBS:
        raise InputError(f"{name!r} is a verb; `deltaloom ls {name}` lists its methods")
    if not found:
        known = [f"{verb}.{entry.name}" if dot else entry.name for entry in among]
        raise InputError(f"no method {name!r}{suggest(name, known)}")
    return found[0]


def _module_doc(entry: Entry) -> str:
    import importlib.util

    spec = importlib.util.find_spec(entry.module)
    assert spec is not None
    assert spec.origin is not None
    doc = ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""
    return doc.partition("\n\n")[2]


def _type_name(annotation: Any) -> str:
    """A type as its user writes it, without the checks that hang on it."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type_name(parts[0])
    if origin in (Union, UnionType):
        return " | ".join(_type_name(part) for part in parts)
    if origin is Literal:
        return " | ".join(repr(part) for part in parts)
    if origin is not None:
        return f"{origin.__name__}[{', '.join(_type_name(part) for part in parts)}]"
    named = {NoneType: "None", ...: "..."}.get(annotation)
    return named or getattr(annotation, "__name__", str(annotation))
