"""The files of tokenizers: read, copied, and with another chat template."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
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


def vocabularies(
    chosen: Path, folders: Sequence[Path], source: str, place: str
) -> dict[Path, dict[str, int]] | str:
    """Numbers by token of each folder; or a warning where some cannot be read and the others are
    equal, so that rows may stay where they are.

    Raises InputError for those that cannot be read when that does matter.
    """
    found = {folder: vocabulary(folder) for folder in dict.fromkeys([chosen, *folders])}
    known = {folder: one for folder, one in found.items() if one is not None}
    same = len({frozenset(numbers.items()) for numbers in known.values()}) <= 1
    if len(known) == len(found):
        for folder, numbers in known.items():
            if not same:
                _check_config(folder, numbers, place)
        return known
    unknown = next(folder for folder, one in found.items() if one is None)
    if source == "union" or not same:
        raise InputError(
            f"{place}: tokenizer_source {source} needs tokenizer.json of every model, and "
            f"{unknown} has none that can be read; load its tokenizer with transformers and save "
            "it there"
        )
    return f"vocabularies were not compared: no tokenizer.json in {unknown}"


def _check_config(folder: Path, numbers: Mapping[str, int], place: str) -> None:
    """Raise InputError for tokens that only transformers, with its own config, would add."""
    config = _json(folder / "tokenizer_config.json")
    named = [*config.get("added_tokens_decoder", {}).values()]
    named += [value for key, value in config.items() if key.endswith("_token")]
    tokens = [one.get("content") if isinstance(one, dict) else one for one in named]
    missing = [one for one in tokens if isinstance(one, str) and one not in numbers]
    if missing:
        raise InputError(
            f"{place}: tokenizer_config.json of {folder} adds {missing[0]!r}, which tokenizer.json "
            "lacks; load the tokenizer with transformers and save it there"
        )


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
