"""The output's vocabulary where those of the models differ: the base's, a model's, or the union.

A union keeps the base's numbers. Behind them come the tokens that the base lacks, as mergekit adds
them: first the plain ones, which become added tokens, then the models' own added ones. mergekit
takes both in the order of hash tables, another in every process; here models come in the order of
the file, the base first, and tokens by number.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltaloom.core.errors import InputError

FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
STALE = ("vocab.*", "merges.txt", "added_tokens.json", "*.model", "*.tiktoken")
"""Files that say again what tokenizer.json says, and then not the same."""


@dataclass(frozen=True)
class Known:
    """One model's tokens."""

    folder: Path
    rows: int
    """Rows of its embedding."""
    numbers: Mapping[str, int]
    """Numbers by token, those beyond the rows included."""


@dataclass(frozen=True)
class NewVocabulary:
    """The tokens of the output."""

    files: Path
    """The folder whose tokenizer the output gets."""
    numbers: Mapping[str, int]
    """Rows by token."""
    text: str | None = None
    """The tokenizer.json, where it is not that of `files`."""

    @property
    def size(self) -> int:
        """Rows of the output's tables."""
        return max(self.numbers.values()) + 1

    def lacking(self, model: Known) -> int:
        """How many of the tokens a model has no row for."""
        return sum(not 0 <= model.numbers.get(one, -1) < model.rows for one in self.numbers)

    def dress(self, out: Path) -> None:
        """Finish the tokenizer in the folder `out`, a copy of that in `files`."""
        if self.text is not None:
            for file in (file for pattern in STALE for file in out.glob(pattern)):
                file.unlink()
            (out / "tokenizer.json").write_text(self.text, encoding="utf-8")
            self._list_added(out / "tokenizer_config.json")

    def _list_added(self, config: Path) -> None:
        values = json.loads(config.read_text("utf-8")) if config.is_file() else {}
        if "added_tokens_decoder" in values:
            added = json.loads(self.text or "{}")["added_tokens"]
            values["added_tokens_decoder"] = {
                str(one["id"]): {key: one[key] for key in ("content", *FLAGS)} for one in added
            }
            text = json.dumps(values, indent=2, ensure_ascii=False)
            config.write_text(text + "\n", encoding="utf-8")


def new_vocabulary(
    source: str, chosen: Known, models: Sequence[Known], more: Sequence[str], place: str
) -> NewVocabulary:
    """The output's vocabulary: that of `chosen`, with all of `models` where `source` is union, and
    with the tokens `more`.

    The base's, here too, is without tokens that its embedding has no row for. Raises InputError
    where a tokenizer cannot be so.
    """
    whole = _within(chosen, place) if source in ("base", "union") else None
    start = NewVocabulary(chosen.folder, chosen.numbers)
    if whole is not None:
        kept = {token: i for token, i in chosen.numbers.items() if i < chosen.rows}
        start = NewVocabulary(chosen.folder, kept, json.dumps(whole, indent=2, ensure_ascii=False))
    new: dict[str, dict[str, Any] | None] = _missing(start, models) if source == "union" else {}
    new |= {token: None for token in more if token not in new and token not in start.numbers}
    if not new:
        return start
    from tokenizers import AddedToken, Tokenizer

    text = start.text or (start.files / "tokenizer.json").read_text("utf-8")
    tokenizer = Tokenizer.from_str(text)
    flags = [{key: bool(row.get(key)) for key in FLAGS} if row else {} for row in new.values()]
    # all at once: each call goes over all added tokens again
    tokenizer.add_tokens([AddedToken(t, **own) for t, own in zip(new, flags, strict=True)])
    numbers = tokenizer.get_vocab()
    numbers = {token: numbers[token] for token in sorted(numbers, key=numbers.__getitem__)}
    return NewVocabulary(start.files, numbers, tokenizer.to_str(pretty=True))


def _missing(start: NewVocabulary, models: Sequence[Known]) -> dict[str, dict[str, Any] | None]:
    """Tokens that the models add to `start`, in order, with their flags where they are added ones.

    A plain token of the start that another model has as an added one becomes one.
    """
    plain: dict[str, None] = {}
    added: dict[str, dict[str, Any]] = {}
    for model in models:
        own = {one["content"]: one for one in _read(model.folder).get("added_tokens", [])}
        for token, i in sorted(model.numbers.items(), key=lambda one: one[1]):
            if i < model.rows and token in own:
                added.setdefault(token, own[token])
            elif i < model.rows:
                plain[token] = None
    has = json.loads(start.text) if start.text else _read(start.files)
    owned = {one["content"] for one in has.get("added_tokens", [])}
    return {
        **{token: None for token in plain if token not in start.numbers and token not in added},
        **{token: row for token, row in added.items() if token not in owned},
    }


def _within(model: Known, place: str) -> dict[str, Any] | None:
    """The tokenizer.json without tokens beyond the rows; None when it has no such."""
    beyond = {token for token, i in model.numbers.items() if i >= model.rows}
    if not beyond:
        return None
    whole = _read(model.folder)
    kind = whole["model"].get("type")
    if kind != "BPE":
        raise InputError(
            f"{place}: the {kind} tokenizer of {model.folder} has {len(beyond)} tokens beyond the "
            f"{model.rows} rows of its embedding, and only a BPE one can do without them; save a "
            "tokenizer there that fits"
        )
    added = whole.get("added_tokens", [])
    whole["added_tokens"] = [one for one in added if one["content"] not in beyond]
    table = whole["model"]["vocab"]
    whole["model"]["vocab"] = {token: i for token, i in table.items() if token not in beyond}
    merges = whole["model"].get("merges", [])
    pairs = [one.split(" ") if isinstance(one, str) else one for one in merges]
    kept = [m for m, (a, b) in zip(merges, pairs, strict=True) if not beyond & {a, b, a + b}]
    whole["model"]["merges"] = kept
    return whole


def _read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "tokenizer.json").read_text("utf-8"))
