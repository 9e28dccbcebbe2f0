"""Plain sums of low-rank adapters, which are adapters: no tensor of the model is ever made."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from deltaloom.core.errors import InputError
from deltaloom.core.method import Survey

if TYPE_CHECKING:
    from deltaloom.core.base import Base
    from deltaloom.core.delta import Delta
    from deltaloom.core.deltas.lowrank import LowRank
    from deltaloom.core.run import Run


def adapters_among(deltas: Sequence[Delta]) -> list[LowRank]:
    """Those of the deltas that are low-rank adapters, in order."""
    from deltaloom.core.deltas.lowrank import LowRank

    return [delta for delta in deltas if isinstance(delta, LowRank)]


def survey_adapters(base: Path, folders: Sequence[Path], rank: int | None) -> Survey:
    """What a plain sum of the adapters in `folders` will read and write, less DoRA's magnitudes."""
    from deltaloom.core.base import Base
    from deltaloom.core.deltas.lowrank import LowRank
    from deltaloom.core.tensors import TensorFolder
    from deltaloom.merge._survey import looked_at

    found = [looked_at(folder, Base(model=str(base))) for folder in folders]
    adapters = [one.delta for one in found if isinstance(one.delta, LowRank)]
    ranks: dict[str, int] = {}
    sides: dict[str, int] = {}
    for adapter in adapters:
        for name, own in adapter.factors.items():
            ranks[name] = ranks.get(name, 0) + own.a.shape[0]
            sides[name] = own.a.shape[1] + own.b.shape[0]
    rest = {name: adapter.rest for adapter in adapters for name in adapter.rest.names()}
    numbers = sum(min(ranks[name], rank or ranks[name]) * sides[name] for name in ranks)
    numbers += sum(math.prod(own.shape(name)) for name, own in rest.items())
    read = sum(TensorFolder(folder).nbytes for folder in folders)
    return Survey(
        product="adapter",
        tensors=2 * len(ranks) + len(rest),
        read_bytes=read,
        written_bytes=4 * numbers,
        passes=1,
        memory_bytes=read + 8 * numbers,
        problems=tuple(text for one in found for text in one.problems),
        notes=tuple(text for one in found for text in one.notes),
    )


def merge_adapters(
    base: Base, deltas: Sequence[LowRank], factors: Sequence[float], rank: int | None, run: Run
) -> Delta:
    """Write sum_i factors_i deltas_i to `run.folder` as one PEFT adapter, cut to `rank` if given.

    One adapter at factor 1 is copied. The ranks and, with `rank`, the part of the squared Frobenius
    norm that is left go to the run's notes. Raises InputError for deltas of different bases and for
    a sum that no PEFT adapter can say.
    """
    from deltaloom.core.delta import load
    from deltaloom.core.deltas.lowrank import LowRank

    first, *others = (delta * factor for delta, factor in zip(deltas, factors, strict=True))
    total = first
    for other in others:
        both = total + other
        assert isinstance(both, LowRank)
        total = both
    if rank is not None:
        total, kept = total.truncate(rank)
        run.note(energy_kept={"least": min(kept.values()), "mean": sum(kept.values()) / len(kept)})
    run.note(rank=max(own.a.shape[0] for own in total.factors.values()))
    try:
        total.save(run.work / "merged")
    except InputError as error:
        raise InputError(f"{error}; or set form=model") from None
    run.publish(run.work / "merged")
    return load(run.folder, base)
