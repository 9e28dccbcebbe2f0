"""A merge by mergekit's YAML at work: planned from headers, then streamed.

Settings that differ by tensor and model become one rule per tensor; layers of several models become
a stack that the engine reads as one folder. Arithmetic is mergekit's, step by step, or with
precision float32 that of our methods.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from deltaloom.core.errors import InputError
from deltaloom.core.tensors import DTYPES, TensorEntry
from deltaloom.merge._checked import SINGLE, Checked
from deltaloom.merge._compat_functions import one_thread
from deltaloom.merge._compat_numbers import CODES, Numbers, common
from deltaloom.merge._compat_sums import CompatRule
from deltaloom.merge._config import Files, Reference
from deltaloom.merge._dialect import ByTensor
from deltaloom.merge._formats import FLOATS
from deltaloom.merge._moved import Move, move
from deltaloom.merge._output import copy_companions
from deltaloom.merge._rule import Rule
from deltaloom.merge._sources import Part, StoredPart
from deltaloom.merge._stack import Opened, Row, Stacked, View, layout
from deltaloom.merge._stream import BLOCK, default_threads, type_of, write_merge
from deltaloom.merge._tables import TABLES, Origins, RowsPart
from deltaloom.merge._vocabulary import copy_tokenizer, remove_tokenizer, write_template
from deltaloom.merge.passthrough import Passthrough

Find = Callable[[Files], Path]


@dataclass
class Plan:
    """What one document's merge will do."""

    read_bytes: int
    written_bytes: int
    scans: Counter[int]
    """Number of tensors by the passes over them before the one that writes."""
    buffer_bytes: int
    """Memory for blocks of all threads; what a rule keeps beside them is not in it."""
    threads: int


class Job:
    """One document with its models opened."""

    def __init__(self, checked: Checked, find: Find, seed: int = 0, scratch: Path | None = None):
        self.checked, self.find, self.scratch = checked, find, scratch
        self._opened: dict[str, Opened] = {}
        self._found: dict[str, Origins] = {}
        self.used = {s.model: self.opened(s.model) for part in checked.parts for s in part.sources}
        leads = [checked.base(part) or part.sources[0].model for part in checked.parts]
        self.leads = [self.used[lead] for lead in leads]
        self._check_ranges()
        self.rows: dict[str, Row] = layout(checked.parts, self.leads, checked.place)
        moved = move(checked, self.used, self._donor())
        self.move = moved if isinstance(moved, Move) else None
        self.notes = [moved] if isinstance(moved, str) else []
        self.tables: list[str] = []
        """Tensors whose rows are moved."""
        if self.move and self.move.needed:
            self.tables = [name for name in self.rows if name.endswith(TABLES)]
        self.values = {
            name: checked.values(row.part, row.names, name, row.t)
            for name, row in self.rows.items()
        }
        self.numbers = {name: self._numbers(row) for name, row in self.rows.items()}
        rules: dict[str, Rule] = {}
        self.rules: dict[str, Rule] = {}
        for name, row in self.rows.items():
            values, numbers = self.values[name], self.numbers[name]
            key = repr((values, numbers))
            if key not in rules:
                rules[key] = checked.rule(row.part, values, seed, numbers)
            self.rules[name] = rules[key]
        self.sources = [self._place(i) for i in range(len(checked.merged(checked.parts[0])))]
        for source in self.sources:
            source.check(self.view)
        for name in self.tables:
            self._origins(name)  # which names tokens that have no row

    def opened(self, reference: Reference) -> Opened:
        """A model, opened once."""
        name = str(reference)
        if name not in self._opened:
            adapter = self.find(reference.lora) if reference.lora else None
            self._opened[name] = Opened(name, self.find(reference.model), adapter)
        return self._opened[name]

    def _numbers(self, row: Row) -> Numbers:
        """The format that a tensor is merged in: `dtype`, or the one that holds all inputs."""
        stored = set()
        for source, name in zip(row.part.sources, row.names, strict=True):
            opened = self.used[source.model]
            entry = opened.find(name)
            if entry is not None and entry.dtype in CODES:
                stored.add(CODES[entry.dtype])
            if opened.adapter is not None:
                stored.add("adapted")  # its sums are finer than the model's own numbers
        kinds = sorted(stored & set(CODES.values())) or ["float32"]
        name = self.checked.config.dtype or common(kinds)
        return Numbers(name, finer=any(one != name for one in stored))

    def _check_ranges(self) -> None:
        for part in self.checked.parts:
            for source in part.sources:
                layers = max(self.used[source.model].stacks.values(), default=0)
                end = source.first + (part.layers or 0)
                if end > layers:
                    raise InputError(
                        f"{self.checked.place}: {source.key}.layer_range = [{source.first}, {end}]:"
                        f" {source.model} has {layers} layers"
                    )

    @cached_property
    def view(self) -> View:
        """The base, or the first model where there is none: it fixes names, shapes and types."""
        table = {}
        for name, row in self.rows.items():
            base = self.checked.base(row.part) or row.part.sources[0].model
            i = self._number(row, base)
            table[name] = (self._as_base(base, name), row.names[i])
        return View(table, dict.fromkeys(self.tables, self.move.size if self.move else 0))

    def _number(self, row: Row, reference: Reference) -> int:
        """Which of a tensor's sources a model is."""
        (i,) = [i for i, one in enumerate(row.part.sources) if one.model == reference]
        return i

    def _base_part(self, tensor: TensorEntry) -> Part:
        """The base's tensor, or the first model's where there is none."""
        if tensor.name not in self.tables:
            return StoredPart(self.view, tensor)
        row = self.rows[tensor.name]
        base = self.checked.base(row.part) or row.part.sources[0].model
        return self._moved(tensor.name, self._number(row, base), as_base=True)

    def _moved(self, name: str, number: int, *, as_base: bool = False) -> RowsPart:
        """A table in the output's vocabulary, of the source `number`."""
        row = self.rows[name]
        opened = [self.used[one.model] for one in row.part.sources]
        if as_base:
            opened[number] = self._as_base(row.part.sources[number].model, name)
        parts = tuple(one.part(own) for one, own in zip(opened, row.names, strict=True))
        columns = self.view[name].count // self.view[name].shape[0]
        numbers = self.numbers[name] if self.checked.precision == "mergekit" else SINGLE
        return RowsPart(parts, self._origins(name), number, columns, numbers)

    def _origins(self, name: str) -> Origins:
        """Where the rows of a table come from, found once."""
        if name not in self._found:
            assert self.move
            row = self.rows[name]
            models = [one.model for one in row.part.sources]
            sizes = [
                self.used[one].entry(own).shape[0]
                for one, own in zip(models, row.names, strict=True)
            ]
            self._found[name] = self.move.origins(models, sizes, row.part.base)
        return self._found[name]

    def _as_base(self, reference: Reference, name: str) -> Opened:
        """A base as files: an adapter on it is merged into `scratch` first."""
        opened = self.used[reference]
        if opened.adapter is None or not self.rules[name].needs_base or self.scratch is None:
            return opened
        key = f"{reference} merged"
        if key not in self._opened:
            self.scratch.mkdir(exist_ok=True)
            folder = self.scratch / f"base-{len(self._opened)}"
            plain = Passthrough.parse({}, "merge passthrough")
            if not folder.exists():  # an interrupted merge may have got as far
                files = opened.folder.path, [opened.adapter.path]
                plain.merge_folders(*files, folder, resume=True)
            self._opened[key] = Opened(key, folder, None)
        return self._opened[key]

    def _place(self, place: int) -> Stacked:
        table, moved = {}, {}
        for name, row in self.rows.items():
            i, source = self.checked.merged(row.part)[place]
            table[name] = (self.used[source.model], row.names[i])
            if name in self.tables:
                moved[name] = partial(self._moved, name, i)
        return Stacked(table, moved, whole=self.checked.parts[0].layers is None)

    @property
    def nbytes(self) -> int:
        """Bytes of the output's tensors."""
        types = self.types
        return sum(
            entry.count * DTYPES[type_of(entry.dtype, types[name])][0]
            for name, entry in self.view.items()
        )

    @property
    def types(self) -> dict[str, str | None]:
        """The output's type of every tensor, None where it is the base's."""
        given = self.checked.dtype
        if given or self.checked.precision == "float32":
            return dict.fromkeys(self.rows, given)
        return {name: numbers.name for name, numbers in self.numbers.items()}

    def plan(self, threads: int | None = None) -> Plan:
        """What the merge will read, write and hold."""
        threads = threads or default_threads()
        view, found = self.view, Plan(0, self.nbytes, Counter(), 0, threads)
        seen: dict[tuple[int, tuple[int, ...]], tuple[int, int]] = {}
        for name, entry in view.items():
            if entry.dtype not in FLOATS or not entry.count:
                found.read_bytes += entry.nbytes * (1 + len(self.sources))
                found.scans[0] += 1
                continue
            rule = self.rules[name]
            key = id(rule), entry.shape
            if key not in seen:
                at_work = rule.begin(entry, len(self.sources))
                seen[key] = at_work.scans, at_work.unit
            scans, unit = seen[key]
            inputs = [source.table[name] for source in self.sources]
            own = [opened.entry(there).nbytes for opened, there in inputs]
            base = entry.nbytes if rule.needs_base else 0
            found.read_bytes += (scans + 1) * (base + sum(own))
            found.scans[scans] += 1
            count = min(max(BLOCK // unit, 1) * unit, entry.count)
            width = np.dtype(rule.width(entry)).itemsize
            each = 12 + width * (len(self.sources) + 2)
            found.buffer_bytes = max(found.buffer_bytes, threads * count * each)
        return found

    def run(
        self,
        out: Path,
        threads: int | None,
        shard_bytes: int,
        *,
        yaml: bytes,
        tokenizer: bool = True,
        memory: int | None = None,
        progress: Callable[[int], None] | None = None,
        key: str = "",
    ) -> list[str]:
        """Merge into the new folder `out`, beside a copy of the `yaml`; returns notes for the user.

        An interrupted call of the same `key`, if there is one, is taken up. Raises as
        `merge_folders` does.
        """
        checked = self.checked
        donor = self._donor()

        def dress(folder: Path) -> None:
            copy_companions(donor, folder, checked.dtype)
            if checked.parts[0].layers is not None:
                self._count_layers(folder / "config.json")
            self._dress(folder, tokenizer=tokenizer)
            (folder / "mergekit_config.yml").write_bytes(yaml)

        in_torch = any(isinstance(one, CompatRule) and one.in_torch for one in self.rules.values())
        with one_thread() if in_torch else nullcontext():
            write_merge(
                self.view,
                self.sources,
                ByTensor(self.rules),
                out,
                dress,
                threads=threads,
                shard_bytes=shard_bytes,
                dtype=self.types,
                memory=memory,
                progress=progress,
                resume=bool(key),
                key=key,
                own=self._base_part,
            )
        return self.notes

    def _donor(self) -> Path:
        """The folder whose config and tokenizer the output gets."""
        first = self.checked.config.references()[0]
        return self.find(first.model)

    def _dress(self, folder: Path, *, tokenizer: bool) -> None:
        template, move = self.checked.config.chat_template, self.move
        if move:
            move.describe(folder)
        if not tokenizer:
            return remove_tokenizer(folder)
        if move:
            copy_tokenizer(move.vocabulary.files, folder)
            move.vocabulary.dress(folder)
        if template:
            names = self.checked.config.references()
            write_template(template, [self.find(one.model) for one in names], folder)
        return None

    def _count_layers(self, file: Path) -> None:
        """Set the number of layers in a stack's config.json."""
        if not file.is_file():
            return
        values = json.loads(file.read_text("utf-8"))
        text = values.get("text_config", values)
        total = sum(part.layers or 0 for part in self.checked.parts)
        keys = [key for key in ("num_hidden_layers", "n_layer", "num_layers") if key in text]
        if not keys:
            raise InputError(
                f"{file.name} of {self._donor()} has no num_hidden_layers to set to {total}"
            )
        text[keys[0]] = total
        if isinstance(text.get("layer_types"), list):
            text["layer_types"] = self._layer_types()
        file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

    def _layer_types(self) -> list[str]:
        kinds: list[str] = []
        for part, lead in zip(self.checked.parts, self.leads, strict=True):
            values = json.loads((lead.folder.path / "config.json").read_text("utf-8"))
            first = next(s.first for s in part.sources if str(s.model) == lead.name)
            own = values.get("text_config", values).get("layer_types") or []
            kinds += own[first : first + (part.layers or 0)]
        return kinds
