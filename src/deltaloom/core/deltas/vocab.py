"""Vocabulary deltas: another tokenizer, and the embedding rows of its tokens over the base.

The tables change their number of rows, so this is no vector over the base's tensors: it has the
identity (`1 * d`), an inner product and a length over its own rows, and neither adds nor scales.
Merging works on what it makes of the base: a model folder, which later steps take as their base.

On disk it is either that folder (`write_model`: config, all weights, tokenizer; what `transfer`
leaves) or, by `save`, `vocab.safetensors` with the new rows alone beside the tokenizer's files.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltaloom.core.atomic import new_file, write_json
from deltaloom.core.base import Base
from deltaloom.core.delta import Delta, describe
from deltaloom.core.deltas._reading import EMBEDDINGS, HEADS
from deltaloom.core.errors import InputError
from deltaloom.core.tensors import TensorFolder, TensorWriter
from deltaloom.core.vocabulary import Vocabulary, load_tokenizer

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

STORED = "vocab.safetensors"
BLOCK = 2**24
"""Elements copied at once."""
IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
STAND_INS = {
    "bos": ("bos", "cls", "eos"),
    "eos": ("eos", "sep", "bos"),
    "cls": ("cls", "bos"),
    "sep": ("sep", "eos"),
    "pad": ("pad", "eos", "unk"),
    "unk": ("unk",),
    "mask": ("mask",),
}
"""Role of a special token -> roles whose token does its work, the best first."""


class Vocab(Delta):
    """Another tokenizer with its embedding rows."""

    kind = "vocab"

    def __init__(
        self, base: Base, tokenizer: Path, tables: Mapping[str, Tensor], folder: Path | None = None
    ) -> None:
        super().__init__(base)
        self.files = tokenizer
        """A folder with the new tokenizer."""
        self.tables = dict(tables)
        """Base's tensor name -> the new table, (tokens, d); one where input and output are tied."""
        self.folder = folder
        """The model folder this is, when it is one."""

    @classmethod
    def load(cls, folder: Path, base: Base) -> Vocab:
        """Read what `save` or `write_model` wrote; raises InputError where it does not fit."""
        stored = folder / STORED
        tables = TensorFolder(stored if stored.exists() else folder)
        names = table_names(base)
        with TensorFolder(base.folder) as own:
            for name in names:
                if name not in tables or tables[name].shape[1:] != own[name].shape[1:]:
                    raise InputError(
                        f"{folder}: has no table {name} of width {own[name].shape[1]}, as the base "
                        f"{base.model} has it; name the base that the tokenizer was moved to"
                    )
        read = {name: tables.read(name) for name in names}
        return cls(base, folder, read, None if stored.exists() else folder)

    def names(self) -> list[str]:
        """The base's embedding tables that this replaces."""
        return sorted(self.tables)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a new table."""
        return tuple(self.tables[name].shape)

    def to_dense(self, name: str) -> Tensor:
        """Refused: the new table has other rows than the base's."""
        raise InputError(
            f"another tokenizer for {self.base.model} is no change of its tensors: {name} gets "
            "rows of other tokens; take the folder that transfer wrote as the base of this step"
        )

    def dot(self, other: Delta) -> float:
        """Inner product of the new rows with those of another delta of the same tokenizer."""
        self.same_base(other)
        if not isinstance(other, Vocab) or any(
            self.shape(name) != other.shape(name) for name in self.tables
        ):
            raise InputError("a change of tokenizer compares only with another to the same one")
        return float(
            sum(
                (table.double() * other.tables[name].double()).sum()
                for name, table in self.tables.items()
            )
        )

    def __mul__(self, factor: float) -> Vocab:
        if factor != 1.0:
            raise InputError("a change of tokenizer has no multiples: tokens are there or not")
        return self

    def __add__(self, other: Delta) -> Delta:
        raise InputError(
            "a change of tokenizer does not add; apply it, and take the model folder that it makes "
            "as the base of what is added"
        )

    def tokenizer(self, base: Base) -> PreTrainedTokenizerBase:
        """The new tokenizer, padding as `Base.tokenizer` does."""
        return base.model_copy(update={"model": str(self.files), "revision": None}).tokenizer()

    def save(self, folder: Path) -> None:
        """Write the new rows and the tokenizer's files, beside `delta.json`."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        load_tokenizer(self.files).save_pretrained(folder)
        with new_file(folder / STORED) as temporary:
            save_file({name: table.contiguous() for name, table in self.tables.items()}, temporary)
        describe(folder, self.kind, self.base)

    def apply(self, base: Base) -> PreTrainedModel:
        """The model with the new tables; its tokenizer is `tokenizer(base)`."""
        if self.folder is not None:
            return base.model_copy(update={"model": str(self.folder), "revision": None}).load()
        import torch

        model: Any = base.load()
        rows = len(next(iter(self.tables.values())))
        model.resize_token_embeddings(rows, mean_resizing=False)
        ids = self._ids(base)
        for config in (model.config, model.generation_config):
            for key in IDS:
                if config is not None and getattr(config, key, None) is not None:
                    setattr(config, key, moved_ids(getattr(config, key), ids))
        with torch.no_grad():
            model.get_input_embeddings().weight.copy_(self.tables[table_names(base)[0]])
            if len(self.tables) > 1:
                model.get_output_embeddings().weight.copy_(self.tables[table_names(base)[1]])
        return model

    def write_model(self, folder: Path) -> None:
        """Write the base with the new tables and tokenizer as a model folder, beside `delta.json`.

        Weights are copied in blocks; the new tables get the type that the base's have.
        """
        folder.mkdir(parents=True, exist_ok=True)
        for code in sorted(self.base.folder.glob("*.py")):  # of models that bring their own
            shutil.copyfile(code, folder / code.name)
        load_tokenizer(self.files).save_pretrained(folder)
        ids = self._ids(self.base)
        config = with_rows(self.base.config(), len(next(iter(self.tables.values()))))
        write_json(folder / "config.json", with_ids(config, ids))
        generation = self.base.folder / "generation_config.json"
        if generation.is_file():
            values = json.loads(generation.read_text(encoding="utf-8"))
            write_json(folder / generation.name, with_ids(values, ids))
        with TensorFolder(self.base.folder) as own:
            self._write_weights(own, folder)
        describe(folder, self.kind, self.base)

    def _write_weights(self, own: TensorFolder, folder: Path) -> None:
        import numpy as np
        import torch

        shapes = {n: self.shape(n) if n in self.tables else entry.shape for n, entry in own.items()}
        layout = [(name, entry.dtype, shapes[name]) for name, entry in own.items()]
        writer = TensorWriter(folder, layout)
        try:
            for name, entry in own.items():
                if name in self.tables:
                    stored = self.tables[name].to(own.read_range(name, 0, 1).dtype).contiguous()
                    raw = stored.reshape(-1).view(torch.uint8).numpy()
                    writer.write(name, 0, raw.view(np.dtype(f"V{entry.itemsize}")))
                    continue
                for start in range(0, entry.count, BLOCK):
                    part = own.raw(name, start, min(start + BLOCK, entry.count))
                    writer.write(name, start, part.view(np.dtype(f"V{entry.itemsize}")))
            writer.finish()
        finally:
            writer.close()

    def _ids(self, base: Base) -> dict[int, int]:
        return special_ids(Vocabulary.read(base.folder), Vocabulary.read(self.files))


def table_names(base: Base) -> tuple[str, ...]:
    """The base's stored tensors with a row for each token: the input's, then the output's; one of
    them where they are tied.

    Raises InputError, naming the tensor, for a model whose tables are not understood.
    """
    with TensorFolder(base.folder) as own:
        shapes = {name: entry.shape for name, entry in own.items()}
    inputs = [name for name in shapes if name.endswith(EMBEDDINGS)]
    outputs = [name for name in shapes if name.endswith(HEADS)]
    if len(inputs) + len(outputs) == 0 or len(inputs) > 1 or len(outputs) > 1:
        raise InputError(
            f"{base.model}: its embeddings are not understood ({len(inputs)} tensors are named "
            f"like {EMBEDDINGS[0]} and {len(outputs)} like {HEADS[0]}, one of each is needed)"
        )
    known = {*inputs, *outputs}
    rows = {shapes[name][0] for name in known}
    for name, shape in shapes.items():
        also = name.removesuffix("bias") + "weight" in outputs or "embed" in name
        also &= "position" not in name
        if also and name not in known and shape and shape[0] in rows:
            raise InputError(
                f"{base.model}: tensor {name} has a row for each token, too, and no method knows "
                "how to move it; use a model with one input and one output table"
            )
    return (*inputs, *outputs)


def is_tied(base: Base) -> bool:
    """Whether the base's output table is its input table."""
    config = base.config()
    text = config.get("text_config", {})
    return bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", True)))


def special_ids(old: Vocabulary, new: Vocabulary) -> dict[int, int]:
    """Number of a special token by that which does its work in another tokenizer: the same role,
    one that stands in for it, or the same text.
    """
    found: dict[int, int] = {}
    for role, number in old.roles.items():
        for other in STAND_INS[role]:
            if other in new.roles:
                found.setdefault(number, new.roles[other])
                break
    for number, text in old.special.items():
        same = new.named(text)
        if same is not None:
            found.setdefault(number, same)
    return found


def with_rows(config: dict[str, Any], rows: int) -> dict[str, Any]:
    """A model's config for tables of so many rows."""
    changed = {**config}
    if isinstance(config.get("text_config"), dict):
        changed["text_config"] = {**config["text_config"], "vocab_size": rows}
    if "vocab_size" in config or "text_config" not in config:
        changed["vocab_size"] = rows
    return changed


def with_ids(config: dict[str, Any], ids: Mapping[int, int]) -> dict[str, Any]:
    """A config with its special tokens' numbers moved; those without a counterpart are left out."""
    changed = {**config}
    for key in IDS:
        if config.get(key) is not None:
            changed[key] = moved_ids(config[key], ids)
    if isinstance(config.get("text_config"), dict):
        changed["text_config"] = with_ids(config["text_config"], ids)
    return changed


def moved_ids(value: Any, ids: Mapping[int, int]) -> Any:
    """One number or a list of them, moved; None where none has a counterpart."""
    if isinstance(value, list):
        return [ids[one] for one in value if one in ids] or None
    return ids.get(value)
