"""The streaming merge: tensors in blocks through a rule, in memory that does not grow with them.

The plan comes from file headers; the output's layout is fixed before its first byte; threads take
whole tensors, largest first, and push fixed buffers through a rule block by block (float32 inside,
float64 where the base is, rounded once). A rule that needs a statistic of the whole tensor asks for
scans before the pass that writes: the file is read again, from the page cache, rather than kept.

The result is in a temporary folder beside the output until it is whole and on the disk, then it is
renamed. What a killed merge left is taken up by the next one that asks for it, else removed. No
model library is loaded, torch neither: a rule in torch can wrap the block's arrays with
`torch.from_numpy`.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from deltaloom.core.errors import InputError, WorkError
from deltaloom.core.tensors import DTYPES, TensorEntry, TensorFolder, TensorWriter
from deltaloom.merge._budget import fitted, needs
from deltaloom.merge._formats import FLOATS, narrow, same_bytes
from deltaloom.merge._output import JOURNAL, copy_companions, published, start_of_machine
from deltaloom.merge._rule import Block, Rule, TensorRule
from deltaloom.merge._sources import Part, Source, StoredPart, open_source
from deltaloom.merge._tables import RowsPart
from deltaloom.merge._workspace import Workspace

BLOCK = 1 << 18
"""Elements per block: a megabyte of float32 per model; smaller ones cost more in calls than they
gain in cache (measured: 64k, 128k, 256k, 512k and 1M elements)."""


@dataclass
class Merge:
    """One merge: what is read, the rule, and where it goes."""

    base: TensorFolder
    sources: list[Source]
    rule: Rule
    writer: TensorWriter
    block: int
    stop: threading.Event
    blocks: Mapping[str, int]
    """Elements a block of the tensors whose blocks are narrower than `block`."""
    journal: Path
    """The line `started`, then the names of the tensors that are written whole, by line."""
    started: str
    """What the journal of a merge that can be taken up starts with."""
    own: Callable[[TensorEntry], Part]
    """The base's tensor as a part."""

    def tensor(self, name: str, space: Workspace) -> None:
        """Merge one tensor and write it."""
        tensor = self.base[name]
        target = self.writer.entries[name]
        if tensor.dtype not in FLOATS:
            return self._copy_equal(tensor, space)
        if not tensor.count:
            return None
        parts = [source.part(tensor) for source in self.sources]
        own = self.own(tensor)
        work = np.dtype(self.rule.width(tensor))
        if self.rule.keeps_base and all(part is None for part in parts):
            for block in self._blocks(tensor, space, work):
                own.fill(block.start, block.out, space.raw)
                self._put(block, target, space)
            return None
        rule = self.rule.begin(tensor, len(parts))
        stored = [part for part in parts if isinstance(part, StoredPart) and not part.gives_change]
        kinds = {tensor.dtype, target.dtype, *(part.tensor.dtype for part in stored)}
        plain = len(stored) == len(parts) and kinds == {"BF16"}
        if rule.takes_bits and plain and isinstance(own, StoredPart):
            return self._merge_bits(rule, own, stored, target, space)
        for number in range(rule.scans):
            for block in self._blocks(tensor, space, work, rule.unit):
                self._fill(block, own, parts, space)
                rule.scan(number, block)
            rule.scanned(number)
        for block in self._blocks(tensor, space, work, rule.unit):
            self._fill(block, own, parts, space)
            rule.write(block)
            if np.isnan(block.out.max()):
                self._blame(block, [own, *parts], tensor)
            self._put(block, target, space)
        return None

    def _merge_bits(
        self,
        rule: TensorRule,
        own: StoredPart,
        parts: Sequence[StoredPart],
        target: TensorEntry,
        space: Workspace,
    ) -> None:
        """All passes on the numbers as they are stored."""

        def stored(block: Block) -> tuple[np.ndarray, np.ndarray]:
            k, n = block.models.shape
            models = block.models.ravel().view(np.uint16)[: k * n].reshape(k, n)
            for part, bits in zip(parts, models, strict=True):
                part.read(block.start, bits)
            base = space.raw.view(np.uint16)[:n]
            if self.rule.needs_base:
                own.read(block.start, base)
            return base, models

        for number in range(rule.scans):
            for block in self._blocks(own.tensor, space, np.dtype(np.float32)):
                rule.scan_bits(number, block.start, *stored(block))
            rule.scanned(number)
        for block in self._blocks(own.tensor, space, np.dtype(np.float32)):
            base, models = stored(block)
            out = space.raw.view(np.uint16)[base.size : 2 * base.size]
            if rule.write_bits(base, models, out):
                self._blame(block, [own, *parts], own.tensor)
            self.writer.write(target.name, block.start, out)

    def _blame(self, block: Block, parts: Sequence[Part | None], tensor: TensorEntry) -> None:
        """Raise InputError for the input whose NaN made one of the output's."""
        start, values = block.start, np.empty_like(block.out)
        raw = np.empty(8 * values.size, np.uint8)  # of its own: the output may have no such input
        for part in parts:
            if part is None:
                continue
            part.fill(start, values, raw)
            if np.isnan(values.max()):
                path, place = part.path, start + int(np.isnan(values).argmax())
                if isinstance(part, RowsPart):
                    path, place = part.origin(place)
                raise InputError(
                    f"{path}: tensor {tensor.name!r} is not a number at element {place}, and "
                    "a merge would spread it; mend the model or leave it out"
                )

    def _blocks(
        self, tensor: TensorEntry, space: Workspace, work: np.dtype, unit: int = 1
    ) -> Iterator[Block]:
        widest = min(self.block, self.blocks.get(tensor.name, self.block))
        size = max(widest // unit, 1) * unit
        space.fit(min(size, tensor.count), work)
        start, stop = 0, size
        if unit == 1:
            # cut where the output file has round positions: a page written in halves costs twice
            target = self.writer.entries[tensor.name]
            stop = -(target.offset // target.itemsize) % size or size
        while start < tensor.count:
            if self.stop.is_set():
                raise WorkError("the merge was stopped")
            stop = min(stop, tensor.count)
            yield space.block(start, stop - start, work)
            start, stop = stop, stop + size

    def _fill(self, block: Block, own: Part, parts: list[Part | None], space: Workspace) -> None:
        form = self.rule.form
        changes = form == "changes"
        mixed = form != "given" and any(p is None or p.gives_change != changes for p in parts)
        if self.rule.needs_base or mixed:
            own.fill(block.start, block.base, space.raw)
        block.given = [part is None or part.gives_change for part in parts]
        for out, part in zip(block.models, parts, strict=True):
            if part is None:
                out[:] = block.base if form == "values" else 0
                continue
            part.fill(block.start, out, space.raw)
            if changes and not part.gives_change:
                np.subtract(out, block.base, out=out)
            elif part.gives_change and form == "values":
                out += block.base

    def _put(self, block: Block, target: TensorEntry, space: Workspace) -> None:
        raw = space.raw[: block.out.size * target.itemsize]
        narrow(block.out, target.dtype, raw)
        self.writer.write(target.name, block.start, raw)

    def _copy_equal(self, tensor: TensorEntry, space: Workspace) -> None:
        for source in self.sources:
            part = source.part(tensor)
            if isinstance(part, StoredPart) and not (
                part.tensor.dtype == tensor.dtype
                and same_bytes(part.folder, part.tensor.name, self.base, tensor.name)
            ):
                raise InputError(
                    f"{source.path}: tensor {tensor.name!r} ({tensor.dtype}) is not a float and "
                    f"differs from the base {self.base.path}; it cannot be merged"
                )
        for block in self._blocks(tensor, space, np.dtype(np.float32)):
            raw = space.raw[: block.out.size * tensor.itemsize]
            self.base.read_into(tensor.name, block.start, raw)
            self.writer.write(tensor.name, block.start, raw)

    def run(self, threads: int, progress: Callable[[int], None] | None) -> None:
        """Merge every tensor with `threads` threads; the first error stops all of them."""
        local = threading.local()

        def one(name: str) -> None:
            if not hasattr(local, "space"):
                local.space = Workspace(len(self.sources))
            try:
                self.tensor(name, local.space)
                with lock:
                    self._note(name)
                    if progress:
                        progress(self.writer.entries[name].nbytes)
            except BaseException as error:
                if not self.stop.is_set():
                    first.append(error)  # later ones only say that they were stopped
                self.stop.set()
                raise

        first: list[BaseException] = []
        lock = threading.Lock()
        names = sorted(self.base, key=lambda name: (-self.base[name].nbytes, name))
        done = self._done()
        if progress and done:
            progress(sum(self.writer.entries[name].nbytes for name in done))
        names = [name for name in names if name not in done]
        with ThreadPoolExecutor(threads, "merge") as pool:
            jobs = [pool.submit(one, name) for name in names]
            try:
                wait(jobs, return_when=FIRST_EXCEPTION)
            except BaseException as error:
                first.insert(0, error)
                self.stop.set()
            pool.shutdown(wait=True, cancel_futures=bool(first))
        if first:
            raise first[0]

    def _done(self) -> set[str]:
        """Tensors that an interrupted merge has written whole; starts the journal."""
        if not self.journal.exists():
            self.journal.write_text(self.started + "\n", "utf-8")
        lines = self.journal.read_text("utf-8").split("\n")
        return {json.loads(line) for line in lines[1:-1]}  # the last may be cut short

    def _note(self, name: str) -> None:
        with open(self.journal, "a", encoding="utf-8") as file:
            file.write(json.dumps(name) + "\n")


def merge_folders(
    base_folder: str | Path,
    source_folders: Sequence[str | Path],
    rule: Rule,
    out_folder: str | Path,
    *,
    threads: int | None = None,
    block: int = BLOCK,
    shard_bytes: int = 5_000_000_000,
    dtype: str | None = None,
    memory: int | None = None,
    progress: Callable[[int], None] | None = None,
    resume: bool = False,
) -> Path:
    """Merge local source folders over a local base folder into the new model folder `out_folder`.

    Sources are whole models, PEFT LoRA adapters or stored changes; config, tokenizer and the like
    are copied from the base. The output has the base's dtype tensor by tensor unless `dtype` (a
    torch name such as "bfloat16") is given for its float tensors; a tensor that no source changes
    is copied. The bytes of a tensor depend neither on `threads` (default: two, fewer on one core)
    nor on `block` (elements) nor on how the inputs are cut into shards. `memory` bounds the bytes
    of all buffers together; fewer threads and narrower blocks keep it. `progress` gets the bytes of
    each tensor written. With `resume`, an interrupted call of the same inputs, rule and settings
    is taken up: tensors that it wrote whole are not written again. Returns `out_folder`.

    Raises InputError for folders that cannot be merged, an output that is already there or a memory
    that no block of some tensor fits, WorkError when another process writes the same output.
    """
    base = TensorFolder(base_folder)
    sources = [open_source(folder) for folder in source_folders]
    if not sources:
        raise InputError("nothing to merge: give at least one model or adapter folder")
    for name, entry in base.items():
        if entry.dtype.startswith("F8"):
            raise InputError(
                f"{base.path}: tensor {name!r} is {entry.dtype}; 8-bit floats do not merge, "
                "convert the model to bfloat16 first"
            )
    for source in sources:
        source.check(base)

    def dress(folder: Path) -> None:
        copy_companions(base.path, folder, dtype)

    return write_merge(
        base,
        sources,
        rule,
        out_folder,
        dress,
        threads=threads,
        block=block,
        shard_bytes=shard_bytes,
        dtype=dtype,
        memory=memory,
        progress=progress,
        resume=resume,
    )


def write_merge(
    base: Any,
    sources: Sequence[Source],
    rule: Rule,
    out_folder: str | Path,
    dress: Callable[[Path], None],
    *,
    threads: int | None,
    block: int = BLOCK,
    shard_bytes: int,
    dtype: str | Mapping[str, str | None] | None,
    memory: int | None = None,
    progress: Callable[[int], None] | None,
    resume: bool = False,
    key: str = "",
    own: Callable[[TensorEntry], Part] | None = None,
) -> Path:
    """As `merge_folders`, of what is opened and checked; `dress` puts all but weights beside them.

    `base` is a TensorFolder or something that reads like one, through `own` where that is given;
    `dtype` may differ by tensor. What an interrupted merge left is taken up only when its `key` was
    the same.
    """
    out = Path(out_folder)
    threads = threads or default_threads()
    blocks: dict[str, int] = {}
    if memory is not None:
        threads, blocks = fitted(needs(base, sources, rule), memory, threads)
    types = dtype if isinstance(dtype, Mapping) else dict.fromkeys(base, dtype)
    layout = [(name, type_of(one.dtype, types[name]), one.shape) for name, one in base.items()]
    started = f"{start_of_machine()} {key}"
    with published(out, started, resume=resume) as folder:
        journal = folder / JOURNAL
        writer = TensorWriter(folder, layout, shard_bytes=shard_bytes, keep=journal.exists())
        try:
            dress(folder)
            stop = threading.Event()
            part = own or partial(StoredPart, base)
            every = list(sources)
            job = Merge(base, every, rule, writer, block, stop, blocks, journal, started, part)
            job.run(threads, progress)
            journal.unlink(missing_ok=True)
            writer.finish()
        finally:
            writer.close()
    return out


def default_threads() -> int:
    """Threads when nobody says how many."""
    return min(2, os.cpu_count() or 1)


def type_of(stored: str, dtype: str | None) -> str:
    """The safetensors type that a tensor of type `stored` gets when `dtype` is asked for."""
    code = _code(dtype)
    return code if code and stored in FLOATS else stored


def _code(dtype: str | None) -> str | None:
    if dtype is None:
        return None
    codes = {name: code for code, (_, name) in DTYPES.items() if code in FLOATS}
    if dtype not in codes:
        raise InputError(f"dtype {dtype!r} is not one of {', '.join(codes)}")
    return codes[dtype]
