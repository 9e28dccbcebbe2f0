"""Models seen as other models: with layers renamed and stacked, with an adapter on them.

A stack lists for every tensor of the output which tensor of which model stands at each place of
the merge; `View` shows the first place as the base that fixes the output, `Stacked` any place as a
source. Nothing is copied.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from deltaloom.core.errors import InputError
from deltaloom.core.tensors import TensorEntry, TensorFolder
from deltaloom.merge._formats import FLOATS
from deltaloom.merge._resolve import LAYER, Slice, place_in
from deltaloom.merge._sources import (
    EMBEDDINGS,
    AdapterSource,
    ModelSource,
    Part,
    ProductPart,
    StoredPart,
    fits,
)

BEFORE = (*EMBEDDINGS, "wpe.weight", "embeddings.weight", "embed_positions.weight")
"""Tensors that come before the layers, by the ends of their names; others come after."""


@dataclass(frozen=True)
class AdaptedPart:
    """A stored tensor and the change of an adapter."""

    stored: StoredPart
    change: ProductPart
    gives_change: bool = False

    @property
    def held(self) -> int:
        """See Part."""
        return self.change.held

    @property
    def path(self) -> Path:
        """See Part."""
        return self.stored.path

    def fill(self, start: int, out: np.ndarray, scratch: np.ndarray) -> None:
        """See Part."""
        self.stored.fill(start, out, scratch)
        added = np.empty_like(out)
        self.change.fill(start, added, scratch)
        out += added


class Opened:
    """The files of one model of the configuration, with its adapter if it has one."""

    def __init__(self, name: str, folder: Path, adapter: Path | None):
        if (folder / "adapter_config.json").is_file():
            raise InputError(f"{folder} is an adapter; write it behind its model: MODEL+{name}")
        self.name = name
        self.model = ModelSource(folder)
        self.folder = self.model.folder
        self.adapter = None
        if adapter is not None:
            self.adapter = AdapterSource(adapter)
            self.adapter.check(self.folder)
        self.stacks = stacks(self.folder)

    def find(self, name: str) -> TensorEntry | None:
        """The tensor `name`, a tied output layer included; None when there is none."""
        return self.folder.get(self.model.tied.get(name, name))

    def entry(self, name: str) -> TensorEntry:
        """The tensor `name`, which is there."""
        return self.folder[self.model.tied.get(name, name)]

    def part(self, name: str) -> AdaptedPart | StoredPart:
        """The tensor `name`, with the adapter's change."""
        entry = self.entry(name)
        stored = StoredPart(self.folder, entry)
        change = self.adapter.part(entry) if self.adapter else None
        return AdaptedPart(stored, change) if isinstance(change, ProductPart) else stored


def stacks(names: Mapping[str, TensorEntry]) -> dict[str, int]:
    """Number of layers by what comes before the layer's number in tensors' names."""
    found: dict[str, set[int]] = {}
    for name in names:
        if match := LAYER.fullmatch(name):
            found.setdefault(match[1], set()).add(int(match[2]))
    return {prefix: len(layers) for prefix, layers in found.items()}


@dataclass(frozen=True)
class Row:
    """One tensor of the output."""

    part: Slice
    t: float
    names: tuple[str, ...]
    """Its name in each source of the slice."""


def layout(parts: list[Slice], leads: list[Opened], place: str) -> dict[str, Row]:
    """The tensors of the output by name; `leads` has the model whose tensors each slice has.

    Raises InputError for layers that a model does not have.
    """
    if parts[0].layers is None:
        return {name: _whole(parts[0], leads[0], name) for name in leads[0].folder}
    rows: dict[str, Row] = {}
    for name in leads[0].folder:
        if _comes_before(name):
            rows[name] = Row(parts[0], 0.0, (name,) * len(parts[0].sources))
    done = 0
    for part, lead in zip(parts, leads, strict=True):
        prefix = _stack(lead, place)
        first = next(s.first for s in part.sources if str(s.model) == lead.name)
        layers = part.layers or 0
        for name in lead.folder:
            match = LAYER.fullmatch(name)
            if match is None or match[1] != prefix or not first <= int(match[2]) < first + layers:
                continue
            step = int(match[2]) - first
            names = tuple(f"{prefix}{one.first + step}.{match[3]}" for one in part.sources)
            rows[f"{prefix}{done + step}.{match[3]}"] = Row(part, place_in(step, layers), names)
        done += layers
    for name in leads[-1].folder:
        if not LAYER.fullmatch(name) and not _comes_before(name):
            rows[name] = Row(parts[-1], 0.0, (name,) * len(parts[-1].sources))
    return rows


def _comes_before(name: str) -> bool:
    return not LAYER.fullmatch(name) and (name.endswith(BEFORE) or "embeddings." in name)


def _whole(part: Slice, lead: Opened, name: str) -> Row:
    match = LAYER.fullmatch(name)
    t = place_in(int(match[2]), lead.stacks[match[1]]) if match else 0.0
    return Row(part, min(t, 1.0), (name,) * len(part.sources))


def _stack(lead: Opened, place: str) -> str:
    """What comes before the layer's number, in a model that has one stack of layers."""
    if len(lead.stacks) != 1:
        found = ", ".join(lead.stacks) or "none"
        raise InputError(
            f"{place}: slices need a model with one stack of layers, and {lead.name} has {found}; "
            "merge it whole, with models"
        )
    return next(iter(lead.stacks))


class View(TensorFolder):
    """The tensors `table`, output name -> (model, its name there), as one folder.

    Those in `rows` are shown with so many rows, and are to be read through their parts only.
    """

    def __init__(self, table: dict[str, tuple[Opened, str]], rows: Mapping[str, int]):
        first = next(iter(table.values()))[0]
        self.path, self.metadata = first.folder.path, {}
        self._files: dict[Path, int] = {}
        self._entries: dict[str, TensorEntry] = {}
        for name, (opened, own) in table.items():
            entry = opened.entry(own)
            shape = (rows[name], *entry.shape[1:]) if name in rows else entry.shape
            self._entries[name] = replace(entry, name=name, shape=shape)
            if entry.file not in self._files:
                self._files[entry.file] = os.open(entry.file, os.O_RDONLY | os.O_CLOEXEC)
        for entry in self._entries.values():
            if entry.dtype.startswith("F8"):
                raise InputError(
                    f"{entry.file}: tensor {entry.name!r} is {entry.dtype}; 8-bit floats do not "
                    "merge, convert the model to bfloat16 first"
                )


class Stacked:
    """One place of the merge as a source, whichever models stand there.

    `moved` gives the parts of tensors that are not read as they lie.
    """

    def __init__(
        self,
        table: dict[str, tuple[Opened, str]],
        moved: Mapping[str, Callable[[], Part]],
        *,
        whole: bool,
    ):
        self.table, self.moved, self.whole = table, moved, whole
        self.path = next(iter(table.values()))[0].folder.path

    def check(self, base: TensorFolder) -> None:
        """See Source."""
        if self.whole:  # every tensor is to be there, and no other
            next(iter(self.table.values()))[0].model.check(base, self.moved)
        for name, (opened, own) in self.table.items():
            entry = opened.find(own)
            wanted = base[name]
            if entry is None:
                raise InputError(
                    f"{opened.folder.path} has no tensor {own!r}, which the output needs as "
                    f"{name!r}; merge layers of models of one architecture"
                )
            same = fits(entry, wanted, name in self.moved)
            if not same or (entry.dtype in FLOATS) != (wanted.dtype in FLOATS):
                raise InputError(
                    f"{opened.folder.path}: tensor {own!r} is {entry.dtype} {list(entry.shape)}, "
                    f"and {name!r} of {base.path} is {wanted.dtype} {list(wanted.shape)}; merge "
                    "models of one architecture and one vocabulary"
                )

    def part(self, tensor: TensorEntry) -> Part:
        """See Source."""
        if tensor.name in self.moved:
            return self.moved[tensor.name]()
        opened, own = self.table[tensor.name]
        return opened.part(own)
