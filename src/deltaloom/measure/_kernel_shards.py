"""The tangent kernels of a study by workers, which load the model again."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

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


@dataclass(frozen=True)
class Asking:
    """The function that is differentiated, and by what, as a worker makes it again."""

    origin: Origin
    parameters: str
    r: int
    seed: int
    width: int
    pad_id: int


@dataclass
class Gradients(Job):
    """A slab of the rows' gradients, (k d) a row, into `store`."""

    asking: Asking
    asked: Sequence[Question]
    slab: list[Part]
    most: int
    store: Features

    def open(self) -> Callable[[int], dict[str, float]]:
        """See Job; what it cost is counted by `share`."""
        how = self.asking
        model, _ = how.origin.load()
        shards = self.store.shards()

        def shard(number: int) -> dict[str, float]:
            part = [self.asked[i] for i in shards[number]]
            found = np.empty((len(part), self.store.width), np.float32)
            with differentiable(model, how.parameters, how.r, how.seed) as ready:
                words = LabelWords(ready.model, how.width, how.pad_id)
                for numbers, batch in words.batches(part, self.most):
                    rows = slab_gradients(ready.model, batch, words, self.slab)
                    found[numbers] = rows.flatten(1).numpy()
            self.store.write_shard(number, found)
            return {}

        return shard


@dataclass
class Tiles(Job):
    """Products of two blocks of the rows in `store`, a file each."""

    store: Features
    folder: Path
    slab: list[Part]
    signs: list[Signs]

    def open(self) -> Callable[[tuple[int, int]], None]:
        """See Job."""
        return self._do

    def _do(self, pair: tuple[int, int]) -> None:
        wide = width_of(self.slab)
        left, right = (self.store.block(number).reshape(-1, wide) for number in pair)
        found = tile(left, right, self.slab, self.signs)
        data = save({_name(signs): np.ascontiguousarray(part) for signs, part in found.items()})
        path = tile_path(self.folder, pair)
        # Named by the process: one that a dead parent left behind may be at the same tile.
        temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            temporary.write_bytes(data)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def tile_path(folder: Path, pair: tuple[int, int]) -> Path:
    """Where a tile is when it is done."""
    return folder / f"{pair[0]:02d}-{pair[1]:02d}.safetensors"


def share(study: Study, kinds: Sequence[Kind], memory: int, asking: Asking, run: Run) -> Kernels:
    """What `Study.compute` finds, to rounding, by `run`'s workers: the same bytes by any number.

    A worker holds at most `memory` bytes of gradients, and files under the run's scratch half of
    that for each of the `BLOCKS`. What is there from an interrupted run is not done again.
    """
    every, k = study.asked, study.words.outputs
    rows = -(-len(every) // BLOCKS)
    entries = max(1, memory // (8 * rows * k))  # float32, and twice while it is written
    cut = slabs(study.sizes, entries)
    about = {
        "of": run.folder.name,
        "questions": digest([[one.ids, one.words] for one in every]),
        "outputs": k,
        "parameters": [asking.parameters, asking.r, asking.seed],
        "entries": entries,
    }
    home = run.work / "kernel" / digest([about, *kinds])
    n = study.lessons or len(every)
    found: Kernels = {kind: np.zeros((n, k, len(every), k)) for kind in kinds}
    starts = range(0, len(every), rows)
    pairs = [(i, j) for i, a in enumerate(starts) for j in range(i, len(starts)) if a < n]
    for number, slab in enumerate(cut):
        folder = home / f"slab-{number:04d}"
        folder.mkdir(parents=True, exist_ok=True)
        if missing := [pair for pair in pairs if not tile_path(folder, pair).exists()]:
            what = f"kernel gradients {number + 1}/{len(cut)}"
            store = Features.create(
                folder / "rows",
                [one.example.id for one in every],
                k * width_of(slab),
                about={**about, "what": what},
                shard_rows=rows,
            )
            fill(store, Gradients(asking, every, slab, study.most, store), run)
            _multiply(Tiles(store, folder, slab, signs_of(kinds)), missing, run)
        shutil.rmtree(folder / "rows", ignore_errors=True)
        for pair in pairs:
            products = {_signs(k): v for k, v in load_file(tile_path(folder, pair)).items()}
            down, across = (range(starts[b], min(starts[b] + rows, len(every))) for b in pair)
            add_tile(found, down, across, products)
    tokens = len(cut) * sum(len(one.ids) for one in every)
    study.words.forward_tokens += tokens
    study.words.backward_tokens += tokens * k
    return found


def _multiply(job: Tiles, missing: list[tuple[int, int]], run: Run) -> None:
    with progress("kernel tiles", len(missing)) as advance:
        run_shards(job, missing, run.workers, lambda *_: advance(1))


def _name(signs: Signs) -> str:
    """A pair of signs as the name of a tensor."""
    return "".join(str(int(signed)) for signed in signs)


def _signs(name: str) -> Signs:
    return name[0] == "1", name[1] == "1"
