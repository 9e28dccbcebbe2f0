"""mkdocs hook: one page a method, from its docstring and its settings; the text lives once."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from deltaloom.core.registry import Entry, methods
from deltaloom.core.spec import explain


def page(entry: Entry) -> str:
    """Markdown of one method's page."""
    spec = importlib.util.find_spec(entry.module)
    doc = ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""
    method = entry.load()
    rows = [
        f"| `{name}` | `{entry.preset.get(name, field.get_default())}` | {explain(method, name)} |"
        for name, field in method.model_fields.items()
    ]
    return "\n".join(
        [
            f"# {entry.verb} {entry.name}",
            "",
            entry.summary,
            "",
            doc.partition("\n\n")[2],
            "",
            "## Settings",
            "",
            "| setting | default | |",
            "|---|---|---|",
            *rows,
        ]
    )


def on_files(files: Files, config: Any) -> Files:
    """Add the pages and list them in the navigation."""
    by_verb: dict[str, list[dict[str, str]]] = {}
    for entry in methods():
        path = f"methods/{entry.verb}-{entry.name}.md"
        files.append(File.generated(config, path, content=page(entry)))
        by_verb.setdefault(entry.verb, []).append({entry.name: path})
    config.nav.append({"Methods": [{verb: pages} for verb, pages in by_verb.items()]})
    return files
