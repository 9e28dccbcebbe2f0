"""What every merger that streams shares: where it reads and writes, how wide and how many at once.

A method adds its settings and `rule`; everything between folders and blocks is here and in
`_stream.py`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from deltaloom.core.errors import InputError
from deltaloom.core.method import Merger, Sizes, Survey, Work
from deltaloom.core.sizes import Bytes

if TYPE_CHECKING:
    from deltaloom.core.base import Base
    from deltaloom.core.delta import Delta
    from deltaloom.core.examples import Examples
    from deltaloom.core.run import Run
    from deltaloom.merge._rule import Rule


class Streamed(Merger):
    """A merger whose last act is a streaming merge of folders by a rule."""

    threads: int | None = Field(default=None, ge=1)
    """Threads over tensors; two when not given. The result does not depend on it."""
    block: int | None = Field(default=None, ge=256)
    """Elements handled at a time, the measure of memory; 262,144 when not given (measured). The
    result does not depend on it."""
    memory: Bytes | None = None
    """Bytes that the merge's buffers may take together, as 256M: as many threads and as wide blocks
    as fit, and refused before the work where no block of some tensor does. All that `threads` and
    `block` ask for when not given. The result does not depend on it."""
    shard_bytes: int = Field(default=5_000_000_000, ge=1)
    """Largest weights file in bytes."""
    dtype: Literal["float64", "float32", "float16", "bfloat16"] | None = None
    """Type of the merged weights; the base's, tensor by tensor, when not given."""

    def work(self, sizes: Sizes) -> Work:
        """Blocks of every model at a time, and one model written; no token is run."""
        from deltaloom.merge._stream import BLOCK

        buffers = 4.0 * (self.block or BLOCK) * (sizes.deltas + 2) * (self.threads or 2)
        buffers = min(buffers, float(self.memory or buffers))
        return Work(memory_bytes=buffers, disk_bytes=float(sizes.weight_bytes))

    def publish(self, base: Base, sources: Sequence[Path], rule: Rule, run: Run) -> Delta:
        """Merge the folders `sources` over `base` by `rule` into `run.folder`; returns the change.

        An interrupted run is taken up: it is the same recipe on the same inputs.
        """
        from deltaloom.core.delta import describe, load
        from deltaloom.core.progress import progress
        from deltaloom.core.tensors import TensorFolder

        merged = run.work / "merged"
        with progress("merge, bytes", TensorFolder(base.folder).nbytes) as advance:
            if not merged.exists():  # an interrupted run may have got as far as the rename
                self.stream(base.folder, sources, rule, merged, advance, resume=True)
        describe(merged, "dense", base)
        run.publish(merged)
        return load(run.folder, base)

    def stream(
        self,
        base: str | Path,
        sources: Sequence[Path],
        rule: Rule,
        out: str | Path,
        progress: Callable[[int], None] | None = None,
        *,
        resume: bool = False,
    ) -> Path:
        """`_stream.merge_folders` with this method's settings."""
        from deltaloom.merge._stream import BLOCK, merge_folders

        return merge_folders(
            base,
            sources,
            rule,
            out,
            threads=self.threads,
            block=self.block or BLOCK,
            shard_bytes=self.shard_bytes,
            dtype=self.dtype,
            memory=self.memory,
            progress=progress,
            resume=resume,
        )

    def survey(self, base: Path, deltas: Sequence[Path | None]) -> Survey:
        """See Merger; the rule is known by then only where it needs no more than settings."""
        from deltaloom.merge._survey import survey

        return survey(self, base, deltas, list, None)


class Streaming(Streamed):
    """A merger that is a rule on blocks of tensors. Subclasses are the methods, and final."""

    @abstractmethod
    def rule(self, models: int, seed: int = 0) -> Rule:
        """The rule for `models` sources; raises InputError when the settings do not fit them."""

    def sources(self, base: Path, deltas: list[Path]) -> list[Path]:
        """What the rule merges, in its order: the deltas, unless the method counts the base in."""
        return deltas

    def survey(self, base: Path, deltas: Sequence[Path | None]) -> Survey:
        """See Merger."""
        from deltaloom.merge._survey import survey

        return survey(self, base, deltas, partial(self.sources, base), self.rule)

    def merge(
        self, base: Base, deltas: list[Delta], run: Run, *, data: Sequence[Examples] = ()
    ) -> Delta:
        """Write the merged model to `run.folder` and return it as a change over `base`.

        Whole models and adapters are read where they lie; a delta that is only in memory is
        written to `run.work` first. Raises InputError for no deltas, settings that do not match
        them, or deltas that do not fit the base.
        """
        places = [Path(f"delta-{i}") for i in range(len(deltas))]
        self.rule(len(self.sources(Path("base"), places)), run.seed)  # before anything is written
        sources = self.sources(base.folder, folders_of(deltas, run.work))
        return self.publish(base, sources, self.rule(len(sources), run.seed), run)

    def merge_folders(
        self,
        base: str | Path,
        deltas: Sequence[str | Path],
        out: str | Path,
        seed: int = 0,
        progress: Callable[[int], None] | None = None,
        *,
        resume: bool = False,
    ) -> Path:
        """Merge local folders `deltas` over the local folder `base` into the new folder `out`.

        `progress` is called with the bytes of each tensor written; `resume` takes up what an
        interrupted call with the same arguments left. Raises as `merge` does.
        """
        sources = self.sources(Path(base), [Path(delta) for delta in deltas])
        rule = self.rule(len(sources), seed)
        return self.stream(base, sources, rule, out, progress, resume=resume)


def shares(weights: list[float] | None, models: int, normalize: bool) -> list[float]:
    """The weights, all 1 when not given, divided by their sum when `normalize`.

    Raises InputError when there are no models, or other weights than models, or their sum is zero.
    """
    if models < 1:
        raise InputError("nothing to merge: give at least one delta")
    weights = [1.0] * models if weights is None else weights
    if len(weights) != models:
        raise InputError(f"{len(weights)} weights for {models} deltas; give one for each")
    if normalize and abs(sum(weights)) < 1e-8:
        raise InputError("the weights sum to zero, so they cannot be normalized")
    total = sum(weights) if normalize else 1.0
    return [weight / total for weight in weights]


def two_ends(base: Path, deltas: list[Path], method: str) -> list[Path]:
    """The two deltas, or the base and the one; raises InputError for any other number."""
    if len(deltas) not in (1, 2):
        raise InputError(
            f"{method} merges two models: give two deltas, or one to merge with the base; "
            f"got {len(deltas)}"
        )
    return deltas if len(deltas) == 2 else [base, *deltas]


def folders_of(deltas: Sequence[Delta], scratch: Path) -> list[Path]:
    """Folders the engine can read: each delta's own, or one in `scratch` that it is written to."""
    return [_folder(delta, scratch / f"delta-{i}") for i, delta in enumerate(deltas)]


def readable(delta: Delta) -> Path | None:
    """The folder of a delta that the engine reads where it lies; None when there is none."""
    from deltaloom.core.deltas.dense import Dense, ModelChange
    from deltaloom.core.deltas.lowrank import LowRank

    if isinstance(delta, LowRank) and delta.folder is not None and delta.plain:
        return delta.folder
    if isinstance(delta, Dense) and len(delta.terms) == 1:
        factor, change = delta.terms[0]
        if factor == 1.0 and isinstance(change, ModelChange):
            return change.tuned.path
    return None


def _folder(delta: Delta, scratch: Path) -> Path:
    """A folder the engine can read: the delta's own, or `scratch` with the delta written to it."""
    from deltaloom.core.deltas.dense import Dense

    own = readable(delta)
    if own is not None:
        return own
    (delta if isinstance(delta, Dense) else Dense(delta.base, ((1.0, delta),))).save(scratch)
    return scratch
