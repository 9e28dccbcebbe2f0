"""The output's tokenizer: files of one of the models, where all share one vocabulary.

Rows of embeddings are never moved from one vocabulary to another, so another tokenizer than the
base's is taken only when that needs no moving.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from deltaloom.core.base import TOKENIZER_FILES
from deltaloom.core.errors import InputError

FILES = (
    *TOKENIZER_FILES,
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
)
TEMPLATE = "chat_template.jinja"
NAMED = ("alpaca", "chatml", "exaone", "llama3", "mistral")
"""Templates that mergekit brings."""


def vocabulary(folder: Path) -> dict[str, int] | None:
    """Numbers by token; None when the folder has no readable tokenizer.json."""
    try:
        whole = json.loads((folder / "tokenizer.json").read_text("utf-8"))
        listed = whole["model"]["vocab"]
        if isinstance(listed, list):
            listed = {row[0]: i for i, row in enumerate(listed)}
        return listed | {one["content"]: one["id"] for one in whole.get("added_tokens", [])}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def check_vocabularies(chosen: Path, folders: list[Path], source: str, place: str) -> str | None:
    """A warning when vocabularies cannot be compared; raises InputError when they differ."""
    wanted = vocabulary(chosen)
    unknown = [folder for folder in folders if vocabulary(folder) is None]
    for folder in folders:
        if wanted is not None and folder not in unknown and vocabulary(folder) != wanted:
            raise InputError(
                f"{place}: tokenizer_source {source}: the vocabularies of {chosen} and {folder} "
                "differ, and rows of embeddings are not moved here; bring the models to one "
                "vocabulary first (mergekit-tokensurgeon does)"
            )
    if wanted is None or unknown:
        names = ", ".join(map(str, [chosen] if wanted is None else unknown))
        if source == "union":
            raise InputError(
                f"{place}: tokenizer_source union needs tokenizer.json of every model, to see that "
                f"their vocabularies are one; {names} has none"
            )
        return f"vocabularies were not compared: no tokenizer.json in {names}"
    return None


def remove_tokenizer(out: Path) -> None:
    """Remove every file of a tokenizer from the folder."""
    for pattern in FILES:
        for file in out.glob(pattern):
            file.unlink()


def copy_tokenizer(source: Path, out: Path) -> None:
    """Give the folder `out` the tokenizer of `source` in place of its own."""
    remove_tokenizer(out)
    for pattern in FILES:
        for file in source.glob(pattern):
            shutil.copyfile(file, out / file.name)


def check_template(text: str, place: str) -> None:
    """Raise InputError for a name in place of a chat template, unless it is `auto`."""
    if text != "auto" and "{" not in text:
        known = "a template of mergekit's own" if text in NAMED else "no template"
        raise InputError(
            f"{place}: chat_template {text!r} is {known}; write auto or the Jinja template itself"
        )


def write_template(text: str, folders: list[Path], out: Path) -> None:
    """Set the chat template: `text`, or with `auto` the commonest of the models', the first of
    equally common ones.
    """
    if text == "auto":
        found = Counter(one for one in map(_template, folders) if one)
        if not found:
            return
        text = found.most_common(1)[0][0]
    (out / TEMPLATE).write_text(text, encoding="utf-8")
    config = out / "tokenizer_config.json"
    values = _json(config)
    if values.pop("chat_template", None) is not None:
        config.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _template(folder: Path) -> str | None:
    if (folder / TEMPLATE).is_file():
        return (folder / TEMPLATE).read_text("utf-8").strip()
    found = _json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(found, list):
        found = {one.get("name"): one.get("template") for one in found}.get("default")
    return found.strip() if isinstance(found, str) else None


def _json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
