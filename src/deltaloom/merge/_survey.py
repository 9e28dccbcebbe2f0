"""What the headers of a merge's files say before it runs: work, memory, and what does not fit.

Every delta is looked at, whatever is wrong with another. One that is not at hand, or that must be
written out first, counts as a whole model of the base's size.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from deltaloom.core.base import Base
from deltaloom.core.delta import Delta, load
from deltaloom.core.errors import InputError
from deltaloom.core.method import Survey
from deltaloom.core.tensors import DTYPES, TensorFolder
from deltaloom.merge._budget import fitted, needs
from deltaloom.merge._formats import FLOATS
from deltaloom.merge._sources import ModelSource, ProductPart, Source, StoredPart, open_source
from deltaloom.merge._stream import BLOCK, type_of
from deltaloom.merge._streaming import readable
from deltaloom.merge._vocabulary import vocabulary

if TYPE_CHECKING:
    from deltaloom.merge._rule import Rule
    from deltaloom.merge._streaming import Streamed


@dataclass
class Looked:
    """One delta, looked at."""

    delta: Delta | None = None
    source: Source | None = None
    """What the engine reads, where that is a folder as it lies."""
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def looked_at(folder: Path, base: Base) -> Looked:
    """The delta in `folder` over `base`, with what does not fit."""
    found = Looked(notes=_tokens(folder, base.folder))
    try:
        found.delta = load(folder, base)
        place = readable(found.delta)
        if place is not None:
            stored, source = TensorFolder(base.folder), open_source(place)
            source.check(stored)
            found.source = source
            found.notes += _types(source, stored)
    except InputError as error:
        found.problems.append(str(error))
    return found


def survey(
    method: Streamed,
    base: Path,
    deltas: Sequence[Path | None],
    order: Callable[[list[Path]], list[Path]],
    rule_for: Callable[[int], Rule] | None,
) -> Survey:
    """Of `method`, which merges the sources that `order` makes of the deltas by the rule that
    `rule_for` gives their number; None when the rule needs more than headers.

    Raises InputError when the base cannot be read.
    """
    stored = TensorFolder(base)
    places = [delta or Path(f"delta {i}") for i, delta in enumerate(deltas)]
    found = {
        place: looked_at(place, Base(model=str(base)))
        for place, delta in zip(places, deltas, strict=True)
        if delta is not None
    }
    problems = [text for one in found.values() for text in one.problems]
    rule = memory = None
    try:
        places = order(places)
        rule = None if rule_for is None else rule_for(len(places))
    except InputError as error:
        problems.append(str(error))
    sources: list[Source] = []
    for place in places:
        known = found[place].source if place in found else None
        sources.append(known or ModelSource(base))
    read, passes = _reading(stored, sources, rule)
    try:
        memory = _memory(method, stored, sources, rule) if rule else None
    except InputError as error:
        problems.append(str(error))
    return Survey(
        product="model",
        tensors=len(stored),
        read_bytes=read,
        written_bytes=sum(
            entry.count * DTYPES[type_of(entry.dtype, method.dtype)][0] for entry in stored.values()
        ),
        passes=passes,
        memory_bytes=memory,
        problems=tuple(problems),
        notes=tuple(text for one in found.values() for text in one.notes),
    )


def _types(source: Source, stored: TensorFolder) -> list[str]:
    if not isinstance(source, ModelSource):
        return []
    pairs = {
        (source.folder[name].dtype, entry.dtype)
        for name, entry in stored.items()
        if name in source.folder and source.folder[name].dtype != entry.dtype
    }
    return [
        f"{source.path} holds {own} where the base {stored.path} holds {wanted}; the result is "
        f"{wanted} unless dtype= says otherwise"
        for own, wanted in sorted(pairs)
    ]


def _tokens(delta: Path, base: Path) -> list[str]:
    mine, theirs = vocabulary(delta), vocabulary(base)
    if mine is None or theirs is None or mine == theirs:
        return []
    other = sum(theirs.get(token) != number for token, number in mine.items())
    return [
        f"{delta} has another vocabulary than the base {base}: {other} of its {len(mine)} tokens "
        "are absent there or have other numbers, and rows of embeddings are not moved; bring the "
        "models to one vocabulary first (mergekit-tokensurgeon does)"
    ]


def _reading(stored: TensorFolder, sources: Sequence[Source], rule: Rule | None) -> tuple[int, int]:
    """Bytes read, again in every pass, and the largest number of passes."""
    total, most = 0, 1
    for tensor in stored.values():
        passes, own = 1, tensor.nbytes
        parts = [source.part(tensor) for source in sources] if tensor.dtype in FLOATS else []
        if rule is not None and parts and tensor.count:
            passes = 1 + rule.begin(tensor, len(sources)).scans
            own *= rule.needs_base
        most = max(most, passes)
        total += passes * own
        for part in parts:
            if isinstance(part, StoredPart):
                total += passes * part.tensor.nbytes
            elif isinstance(part, ProductPart):
                total += part.left.nbytes + part.right.nbytes
    return total, most


def _memory(method: Streamed, stored: TensorFolder, sources: Sequence[Source], rule: Rule) -> int:
    """Bytes of all buffers, as wide as they may become."""
    needed = needs(stored, sources, rule)
    threads = method.threads or min(2, os.cpu_count() or 1)
    blocks: dict[str, int] = {}
    if method.memory is not None:
        threads, blocks = fitted(needed, method.memory, threads)
    widest = method.block or BLOCK
    each = (
        need.of(min(widest, blocks.get(name, widest), stored[name].count))
        for name, need in needed.items()
    )
    return threads * max(each, default=0)
