"""A number of bytes kept by construction: how wide the blocks and how many the threads may be.

What a thread takes for a tensor is known before anything is read: so many bytes an element of a
block (the engine's buffers, a number of every source, what the rule says of itself), and so many
whatever the block (adapters' factors, counts). A block is what is left of the thread's share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from deltaloom.core.errors import InputError
from deltaloom.core.tensors import TensorEntry
from deltaloom.merge._formats import FLOATS
from deltaloom.merge._rule import Rule
from deltaloom.merge._sources import Source

LEAST = 4096
"""Elements of the smallest block, where the rule has no larger unit: below it the calls cost more
than the numbers."""
ENGINE = 24
"""Bytes an element that the engine takes: raw 8, and 16 for changes of format."""


@dataclass(frozen=True)
class Need:
    """What one thread takes for one tensor."""

    name: str
    least: int
    """Elements of the smallest block."""
    unit: int
    each: int
    """Bytes an element of a block."""
    held: int
    """Bytes whatever the block."""

    @property
    def nbytes(self) -> int:
        """Bytes of the smallest block."""
        return self.held + self.each * self.least

    def of(self, block: int) -> int:
        """Bytes with blocks of `block` elements, or a unit where that is more."""
        return self.held + self.each * max(block // self.unit * self.unit, self.unit)

    def block(self, share: int) -> int:
        """Elements of the largest block, a multiple of the unit, within `share` bytes."""
        return (share - self.held) // self.each // self.unit * self.unit


def needs(
    base: Mapping[str, TensorEntry], sources: Sequence[Source], rule: Rule
) -> dict[str, Need]:
    """What each tensor of the base takes."""
    return {name: _need(tensor, sources, rule) for name, tensor in base.items() if tensor.count}


def _need(tensor: TensorEntry, sources: Sequence[Source], rule: Rule) -> Need:
    if tensor.dtype not in FLOATS:  # copied
        return Need(tensor.name, min(LEAST, tensor.count), 1, ENGINE + 4 * (len(sources) + 2), 0)
    width = np.dtype(rule.width(tensor)).itemsize
    one = rule.begin(tensor, len(sources))
    parts = [source.part(tensor) for source in sources]
    held = one.held + sum(part.held for part in parts if part is not None)
    each = ENGINE + width * (len(sources) + 2) + one.spare * width // 4
    least = one.unit if one.unit > 1 else min(LEAST, tensor.count)
    return Need(tensor.name, least, one.unit, each, held)


def fitted(needed: Mapping[str, Need], memory: int, threads: int) -> tuple[int, dict[str, int]]:
    """Threads, at most `threads`, and elements a block by tensor, all within `memory` bytes.

    Raises InputError naming the tensor that takes more alone.
    """
    worst = max(needed.values(), key=lambda need: need.nbytes, default=None)
    if worst is None:
        return threads, {}
    if worst.nbytes > memory:
        together = "of which no part can be merged alone " if worst.unit > 1 else ""
        raise InputError(
            f"memory = {memory:,}: tensor {worst.name!r} {together}takes {worst.nbytes:,} bytes; "
            "give at least that"
        )
    threads = min(threads, memory // worst.nbytes)
    share = memory // threads
    return threads, {name: need.block(share) for name, need in needed.items()}
