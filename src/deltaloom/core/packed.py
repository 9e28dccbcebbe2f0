"""Encoded rows of a large pool, five bytes a token.

A list of Python numbers is 16 to 40 bytes a token (two lists, and an object for every id above
256): for LESS's 270,000 rows gigabytes, where the pass over them needs one shard at a time.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import Any, overload

from deltaloom.core.encoding import Encoded, encode
from deltaloom.core.examples import Example


class PackedRows(Sequence[Encoded]):
    """A sequence of rows that makes each `Encoded` anew when it is asked for."""

    def __init__(self, rows: Iterable[Encoded]) -> None:
        self._ids: list[str] = []
        self._tokens, self._mask, self._ends = array("i"), bytearray(), array("q", [0])
        self._truncated, self._labels = bytearray(), array("i")
        for row in rows:
            self._ids.append(row.id)
            self._tokens.extend(row.input_ids)
            self._mask.extend(row.response_mask)
            self._ends.append(len(self._tokens))
            self._truncated.append(row.truncated)
            self._labels.append(-1 if row.label is None else row.label)

    def __len__(self) -> int:
        return len(self._ids)

    @overload
    def __getitem__(self, index: int) -> Encoded: ...
    @overload
    def __getitem__(self, index: slice) -> list[Encoded]: ...
    def __getitem__(self, index: int | slice) -> Encoded | list[Encoded]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        own = slice(self._ends[number], self._ends[number + 1])
        label = self._labels[number]
        return Encoded(
            self._ids[number],
            self._tokens[own].tolist(),
            list(self._mask[own]),
            bool(self._truncated[number]),
            None if label < 0 else label,
        )

    @property
    def cut(self) -> int:
        """How many rows were too long and were cut."""
        return sum(self._truncated)


def encode_packed(examples: Iterable[Example], tokenizer: Any, max_length: int) -> PackedRows:
    """`encode`, with the rows packed as they come; raises as it does."""
    return PackedRows(
        row for example in examples for row in encode([example], tokenizer, max_length)
    )
