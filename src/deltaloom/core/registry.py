"""The registry of methods: the folder is the registry.

`methods("select")` reads module docstrings with `ast` and imports nothing; `get("select", "less")`
imports that one file. A family that is one formula is one file with a literal table `PRESETS`
(row name -> summary, paper and the fields whose defaults differ). Other packages join through entry
points of the group `deltaloom.<verb>` (name = method, value = `module:Class`).
"""

from __future__ import annotations

import ast
import importlib
import inspect
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from deltaloom.core.errors import InputError, suggest
from deltaloom.core.method import Method

PACKAGE_ROOT = Path(__file__).parents[1]
VERBS = ("select", "tune", "merge", "transfer", "search", "measure")


@dataclass(frozen=True)
class Entry:
    """One row of the registry, readable without importing the method."""

    verb: str
    name: str
    summary: str
    paper: str
    module: str
    preset: dict[str, Any] = field(default_factory=dict)
    attribute: str | None = None

    def load(self) -> type[Method]:
        """Import the file and return its one final class."""
        if self.attribute:
            return self._outside()
        module = importlib.import_module(self.module)
        own = [
            value
            for value in vars(module).values()
            if inspect.isclass(value)
            and issubclass(value, Method)
            and value.__module__ == module.__name__
        ]
        if len(own) != 1:
            raise InputError(f"{self.module} must define one method class and defines {len(own)}")
        if own[0].verb != self.verb:
            raise InputError(
                f"{self.verb} {self.name}: {self.module} is no {self.verb} method but a "
                f"{own[0].verb} method; repair or remove the package that brings it"
            )
        return own[0]

    def _outside(self) -> type[Method]:
        try:
            found = getattr(importlib.import_module(self.module), str(self.attribute))
        except (ImportError, AttributeError) as error:
            raise InputError(
                f"{self.verb} {self.name}: {self.module}:{self.attribute} does not import "
                f"({error}); repair or remove the package that brings it"
            ) from None
        if not (inspect.isclass(found) and issubclass(found, Method) and found.verb == self.verb):
            raise InputError(
                f"{self.verb} {self.name}: {self.module}:{self.attribute} is no {self.verb} method"
            )
        return found

    def make(self, values: dict[str, Any] | None = None) -> Method:
        """An instance from the preset's defaults overridden by `values`."""
        return self.load().parse({**self.preset, **(values or {})}, f"{self.verb} {self.name}")


@cache
def methods(verb: str | None = None) -> tuple[Entry, ...]:
    """Every method of `verb` (of all verbs when None), sorted by name; imports none of them."""
    if verb is None:
        return tuple(entry for name in VERBS for entry in methods(name))
    if verb not in VERBS:
        raise InputError(f"no verb {verb!r}{suggest(verb, VERBS)}")
    found = [entry for path in _files(verb) for entry in _entries(verb, path)]
    for point in metadata.entry_points(group=f"deltaloom.{verb}"):
        module, _, attribute = point.value.partition(":")
        found.append(
            Entry(verb, point.name, f"from {module}", "", module, attribute=attribute or None)
        )
    return tuple(sorted(found, key=lambda entry: entry.name))


def get(verb: str, name: str) -> Entry:
    """The registry row of one method; raises InputError with a suggestion when there is none."""
    known = methods(verb)
    found = [entry for entry in known if entry.name == name]
    if not found:
        elsewhere = [other for other in VERBS if any(e.name == name for e in methods(other))]
        if elsewhere:
            hint = f"; did you mean `{elsewhere[0]} {name}`?"
        else:
            hint = suggest(name, {entry.name for entry in known})
        if hint.endswith("?"):
            hint += f" `deltaloom ls {verb}` lists them all"
        raise InputError(f"no {verb} method {name!r}{hint}")
    if len(found) > 1:
        homes = " and ".join(entry.module for entry in found)
        raise InputError(f"{homes} both bring a {verb} method {name!r}; remove one of them")
    return found[0]


def _files(verb: str) -> list[Path]:
    folder = PACKAGE_ROOT / verb
    return sorted(path for path in folder.glob("*.py") if not path.name.startswith("_"))


def _entries(verb: str, path: Path) -> list[Entry]:
    text = path.read_text(encoding="utf-8")
    module = f"deltaloom.{verb}.{path.stem}"
    presets = _presets(ast.parse(text)) if "\nPRESETS" in text else None
    if presets is None:
        doc = _docstring(text)
        summary = doc.split("\n\n")[0].replace("\n", " ")
        return [Entry(verb, path.stem, summary, paper_of(doc), module)]
    return [
        Entry(
            verb,
            name,
            row["summary"],
            row["paper"],
            module,
            {key: value for key, value in row.items() if key not in ("summary", "paper")},
        )
        for name, row in presets.items()
    ]


def _docstring(text: str) -> str:
    """A module's docstring; parsing all methods' files would take longer than all the rest."""
    if text.startswith('"""'):
        return text[3 : text.index('"""', 3)].strip()
    return ast.get_docstring(ast.parse(text)) or ""


def _presets(tree: ast.Module) -> dict[str, dict[str, Any]] | None:
    for node in tree.body:
        if isinstance(node, ast.Assign):
            target, value = node.targets[0], node.value
        elif isinstance(node, ast.AnnAssign):
            target, value = node.target, node.value
        else:
            continue
        if isinstance(target, ast.Name) and target.id == "PRESETS" and value is not None:
            return ast.literal_eval(value)
    return None


def paper_of(doc: str) -> str:
    """The text after `Paper:` in a module docstring, up to the end of its paragraph."""
    _, found, rest = doc.partition("Paper:")
    return " ".join(rest.split("\n\n")[0].split()) if found else ""
