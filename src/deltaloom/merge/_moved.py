"""What one document does to its models' vocabularies, known before any row is read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deltaloom.core.errors import InputError
from deltaloom.merge._checked import Checked
from deltaloom.merge._config import Reference, Token, TokenRow
from deltaloom.merge._sources import EMBEDDINGS
from deltaloom.merge._stack import Opened
from deltaloom.merge._tables import ZERO, Origins, origins
from deltaloom.merge._union import Known, NewVocabulary, new_vocabulary
from deltaloom.merge._vocabulary import vocabularies


@dataclass(frozen=True)
class Move:
    """From the models' vocabularies to the output's."""

    vocabulary: NewVocabulary
    known: Mapping[Reference, Known]
    tokens: Mapping[str, Token]
    padding: int
    """Rows behind those of the tokens."""
    place: str

    @property
    def size(self) -> int:
        """Rows of the output's tables."""
        return self.vocabulary.size + self.padding

    @property
    def needed(self) -> bool:
        """Whether any row of any model is to have another place."""
        same = (one.numbers == self.vocabulary.numbers for one in self.known.values())
        rows = all(one.rows == self.size for one in self.known.values())
        return not (all(same) and rows) or any(one.force for one in self.tokens.values())

    def describe(self, folder: Path) -> None:
        """Put the number of rows into the config of the output, and where another model's
        tokenizer is taken the numbers that its config gives to special tokens.
        """
        for file in (folder / "config.json", folder / "generation_config.json"):
            if not file.is_file():
                continue
            values = json.loads(file.read_text("utf-8"))
            special = self._special_tokens(file.name)
            for part in (values, values.get("text_config", {})):
                part |= {key: special[key] for key in part if key in special}
                part |= {"vocab_size": self.size} if "vocab_size" in part else {}
            file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

    def _special_tokens(self, name: str) -> dict[str, Any]:
        """Numbers of special tokens in the config of the model whose tokenizer is taken."""
        for file in (self.vocabulary.files / name, self.vocabulary.files / "config.json"):
            if file.is_file():
                values = json.loads(file.read_text("utf-8"))
                both = values | values.get("text_config", {})
                return {key: value for key, value in both.items() if key.endswith("_token_id")}
        return {}

    def origins(
        self, models: Sequence[Reference], rows: Sequence[int], base: Reference | None
    ) -> Origins:
        """Where the rows of a table of these models, with so many rows each, come from."""
        wanted = self.vocabulary.numbers
        place = models.index(base) if base in models else None
        found = origins(wanted, [self.known[one].numbers for one in models], rows, place)
        for token, how in self.tokens.items():
            at = wanted[token]
            if how.force or (found.own[:, at] < 0).any():
                found.given[at], found.row[at] = self._asked(token, how, models, rows, found)
                if how.force:
                    found.own[:, at] = -1
        return replace(found, padding=self.padding)

    def _asked(
        self,
        token: str,
        how: Token,
        models: Sequence[Reference],
        rows: Sequence[int],
        found: Origins,
    ) -> tuple[int, int]:
        """The model, as a number, and the row that the file names for a token."""
        key, source = f"{self.place}: tokenizer.tokens[{token!r}]", how.source
        if isinstance(source, TokenRow) and source.kind == "zero":
            return ZERO, 0
        model = source.model if isinstance(source, TokenRow) else source
        if model is None or model not in models:
            named = "names no source" if model is None else f"names {model}"
            raise InputError(f"{key} {named}; name one of the merged models, or kind: zero")
        i = models.index(model)
        if isinstance(source, TokenRow) and source.token_id is not None:
            row = source.token_id
        elif isinstance(source, TokenRow):
            row = self.known[model].numbers.get(source.token or "", -1)
        else:
            row = int(found.own[i, self.vocabulary.numbers[token]])
        if not 0 <= row < rows[i]:
            raise InputError(f"{key}: {model} has no row for it; name a token that it has")
        return i, row


def move(checked: Checked, used: Mapping[Reference, Opened], donor: Path) -> Move | str | None:
    """What is done to the vocabularies; a warning where they cannot be compared and seem the same,
    None where the document does not speak of them.

    `donor` is the base's folder, or the first model's. Raises InputError for vocabularies that
    cannot be brought together.
    """
    source, place = checked.config.source_of_tokens(), checked.place
    if source is None:
        return None
    folders = {reference: opened.folder.path for reference, opened in used.items()}
    chosen = donor
    if isinstance(source, Reference):
        named = [folder for one, folder in folders.items() if one.model == source.model]
        if not named:
            raise InputError(f"{place}: tokenizer source {source} is none of the merged models")
        chosen = named[0]
    read = vocabularies(chosen, list(folders.values()), str(source), place)
    if isinstance(read, str):
        return read
    known = {
        reference: Known(opened.folder.path, _rows(opened, place), read[opened.folder.path])
        for reference, opened in used.items()
    }
    first = next((one for one in known.values() if one.folder == chosen), None)
    first = first or Known(chosen, max(read[chosen].values()) + 1, read[chosen])
    # the base first, as in the order of references
    order = sorted(known, key=checked.config.references().index)
    given = checked.config.tokenizer
    tokens = (given.tokens if given else None) or {}
    made = new_vocabulary(str(source), first, [known[one] for one in order], list(tokens), place)
    multiple = (given.pad_to_multiple_of if given else None) or 1
    found = Move(made, known, tokens, -made.size % multiple, place)
    for reference, one in known.items():
        if found.vocabulary.lacking(one) == len(made.numbers):
            raise InputError(
                f"{place}: {reference} has none of the tokens of {chosen}, so that no row of its "
                "embedding would be left; leave it out, or give it the tokenizer it was made with"
            )
    return found


def _rows(opened: Opened, place: str) -> int:
    """Rows of a model's embedding."""
    rows = [one.shape[0] for name, one in opened.folder.items() if name.endswith(EMBEDDINGS)]
    if len(rows) != 1:
        raise InputError(
            f"{place}: {opened.folder.path} has {len(rows)} embeddings with a name that is known "
            f"({', '.join(EMBEDDINGS)}), and the vocabulary is that of one; leave out tokenizer"
        )
    return rows[0]
