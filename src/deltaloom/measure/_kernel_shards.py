"""The tangent kernels of a study, shard by shard, here or by workers.

Two maps, one after the other: every block of rows' gradients into a file, then a file for each
tile, the products of two blocks. So no row is differentiated twice, whoever does the tiles.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import load_file, save

from deltaloom.core.features import Features
from deltaloom.core.progress import progress
from deltaloom.core.spec import digest
from deltaloom.engine.kernel_tiles import (
    Part,
    add_tile,
    signs_of,
    slab_gradients,
    slabs,
    tile,
    width_of,
)
from deltaloom.engine.shards import Job, fill, run_shards
from deltaloom.measure._differentiable import differentiable
from deltaloom.measure._label_words import LabelWords, Question

if TYPE_CHECKING:
    from deltaloom.core.origin import Origin
    from deltaloom.core.run import Run
    from deltaloom.engine.ntk import Kernels, Kind, Signs
    from deltaloom.measure._kernel_study import Study

BLOCKS = 8
"""Blocks that the rows are cut into at most: so many workers can differentiate at once, and each
block is read so many times. Ours."""
FEWEST = 4096
"""Entries of a slab at least, however little memory there is: each slab is a pass. Ours."""


@dataclass(frozen=True)
class Asking:
    """By what a model is differentiated, and how a worker gets the model."""

    origin: Origin | None
    parameters: str
    r: int
    seed: int


@dataclass
class Gradients(Job):
    """A slab of the rows' gradients, (k d) a row, into `store`."""

    asking: Asking
    asked: Sequence[Question]
    width: int
    pad_id: int
    most: int
    slab: list[Part]
    store: Features
    model: Any = field(default=None, repr=False)
    """The model at hand, made ready; None loads it."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "model": None}  # too large to send

    def open(self) -> Callable[[int], dict[str, float]]:
        """See Job; what it cost is counted by `tangent_kernels`."""
        if self.model is not None:
            return lambda number: self._shard(self.model, number)
        how = self.asking
        assert how.origin is not None
        model, _ = how.origin.load()

        def shard(number: int) -> dict[str, float]:
            with differentiable(model, how.parameters, how.r, how.seed) as ready:
                return self._shard(ready.model, number)

        return shard

    def _shard(self, model: Any, number: int) -> dict[str, float]:
        part = [self.asked[i] for i in self.store.shards()[number]]
        found = np.empty((len(part), self.store.width), np.float32)
        words = LabelWords(model, self.width, self.pad_id)
        for numbers, batch in words.batches(part, self.most):
            found[numbers] = slab_gradients(model, batch, words, self.slab).flatten(1).numpy()
        self.store.write_shard(number, found)
        return {}


@dataclass
class Tiles(Job):
    """Products of two blocks of the rows in `store`, a file each."""

    store: Features
    folder: Path
    slab: list[Part]
    signs: list[Signs]
    device: str

    def open(self) -> Callable[[tuple[int, int]], None]:
        """See Job."""
        return self._do

    def _do(self, pair: tuple[int, int]) -> None:
        wide = width_of(self.slab)
        left, right = (self.store.block(number).reshape(-1, wide) for number in pair)
        found = tile(left, right, self.slab, self.signs, self.device)
        path = tile_path(self.folder, pair)
        # Named by the process: one that a dead parent left behind may be at the same tile.
        temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            temporary.write_bytes(save({_name(signs): part for signs, part in found.items()}))
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def tile_path(folder: Path, pair: tuple[int, int]) -> Path:
    """Where a tile is when it is done."""
    return folder / f"{pair[0]:02d}-{pair[1]:02d}.safetensors"


def tangent_kernels(
    study: Study, kinds: Sequence[Kind], asking: Asking, memory: int, run: Run
) -> Kernels:
    """The kernels (n, k, m, k): rows to learn from by all rows; without lessons both are all.

    Whoever works holds at most `memory` bytes of gradients, and files in the run's scratch half of
    that for each of the `BLOCKS`. What an interrupted run left there is not done again.
    """
    every, k = study.asked, study.words.outputs
    rows = -(-len(every) // BLOCKS)
    entries = max(FEWEST, memory // (8 * rows * k))  # float32, and twice while it is written
    about = {
        "of": run.folder.name,
        "questions": digest([[one.ids, one.words] for one in every]),
        "parameters": [asking.parameters, asking.r, asking.seed],
        "entries": entries,
    }
    home = run.work / "kernel" / digest([about, *kinds])
    n = study.lessons or len(every)
    found: Kernels = {kind: np.zeros((n, k, len(every), k)) for kind in kinds}
    blocks = [range(a, min(a + rows, len(every))) for a in range(0, len(every), rows)]
    pairs = [(i, j) for j in range(len(blocks)) for i in range(j + 1) if blocks[i].start < n]
    cut = slabs(study.sizes, entries)
    for number, slab in enumerate(cut):
        folder = home / f"slab-{number:04d}"
        if missing := [pair for pair in pairs if not tile_path(folder, pair).exists()]:
            what = f"kernel gradients {number + 1}/{len(cut)}"
            store = _gradients(study, slab, {**about, "what": what}, rows, asking, folder, run)
            job = Tiles(store, folder, slab, signs_of(kinds), str(study.words.device))
            _multiply(job, missing, run)
        shutil.rmtree(folder / "rows", ignore_errors=True)
        for i, j in pairs:
            products = load_file(tile_path(folder, (i, j)))
            add_tile(found, blocks[i], blocks[j], {_signs(of): p for of, p in products.items()})
    tokens = len(cut) * sum(len(one.ids) for one in every)
    study.words.forward_tokens += tokens
    study.words.backward_tokens += tokens * k
    return found


def _gradients(
    study: Study,
    slab: list[Part],
    about: dict[str, Any],
    rows: int,
    asking: Asking,
    folder: Path,
    run: Run,
) -> Features:
    """The slab's gradients of all rows, finished."""
    words, workers = study.words, run.model_workers
    ids = [one.example.id for one in study.asked]
    width = words.outputs * width_of(slab)
    store = Features.create(folder / "rows", ids, width, about=about, shard_rows=rows)
    job = Gradients(asking, study.asked, words.width, words.pad_id, study.most, slab, store)
    if workers.here:
        job.model = words.model
    return fill(store, job, run, workers)


def _multiply(job: Tiles, missing: list[tuple[int, int]], run: Run) -> None:
    with progress("kernel tiles", len(missing)) as advance:
        run_shards(job, missing, run.model_workers, lambda *_: advance(1))


def _name(signs: Signs) -> str:
    """A pair of signs as the name of a tensor."""
    return "".join(str(int(signed)) for signed in signs)


def _signs(name: str) -> Signs:
    return name[0] == "1", name[1] == "1"
