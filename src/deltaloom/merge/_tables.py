"""Embeddings and output layers read in another vocabulary's order, row by row.

Each row of the output is a token. A model that has the token gives its own row; one that lacks it
gets what mergekit gives it: the row of the only model that has the token, else the base's, else
the mean of all that have it, else zeros. Nothing is moved on disk or held: a row is read where it
lies when its block is filled, and neighbours that stay neighbours are read at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from deltaloom.core.tensors import DTYPES
from deltaloom.merge._compat_numbers import Numbers
from deltaloom.merge._formats import widen
from deltaloom.merge._sources import EMBEDDINGS, HEADS, Part, StoredPart

TABLES = (*EMBEDDINGS, *HEADS, "lm_head.bias")
"""Tensors of which each row is a token, by the ends of their names."""
ZERO, MEAN, PADDING = -1, -2, -3
"""In place of a model's number: a row of none, of several, and the mean of the whole table."""


@dataclass(frozen=True)
class Origins:
    """Where the rows of one table are from, for `k` models and `n` tokens."""

    own: np.ndarray
    """(k, n) int32: the token's row in each model, -1 where it is to have another."""
    given: np.ndarray
    """(n,) int32: the model whose row those get that have none, or ZERO or MEAN."""
    row: np.ndarray
    """(n,) int32: which row of it."""
    padding: int = 0
    """Rows behind those of the tokens: the mean of them all."""

    def of(self, place: int) -> tuple[np.ndarray, np.ndarray]:
        """For each row of one model's table (n + padding,) the model that it is from, or what
        stands for that, and its row there.
        """
        kept = self.own[place] >= 0
        model = np.where(kept, np.int32(place), self.given)
        row = np.where(kept, self.own[place], self.row)
        ends = np.full((2, self.padding), [[PADDING], [0]], np.int32)
        return np.append(model, ends[0]), np.append(row, ends[1])


def origins(
    wanted: Mapping[str, int],
    models: Sequence[Mapping[str, int]],
    rows: Sequence[int],
    base: int | None,
) -> Origins:
    """Where the rows of a table come from, whose tokens have the numbers `wanted`.

    `models` are the models' own numbers of tokens, `rows` how many rows their tables have, `base`
    which of them is the base.
    """
    own = np.full((len(models), max(wanted.values()) + 1), -1, np.int32)
    places = np.fromiter(wanted.values(), np.int64, len(wanted))
    for line, numbers, count in zip(own, models, rows, strict=True):
        found = np.fromiter((numbers.get(token, -1) for token in wanted), np.int64, len(wanted))
        line[places] = np.where(found < count, found, -1)
    having = own >= 0
    total = having.sum(0)
    given = np.where(total == 1, having.argmax(0), MEAN)
    if base is not None:
        given = np.where((total > 1) & having[base], base, given)
    given = np.where(total == 0, ZERO, given).astype(np.int32)
    row = np.take_along_axis(own, np.maximum(given, 0)[None], 0)[0]
    return Origins(own, given, row)


@dataclass(frozen=True)
class RowsPart:
    """One model's table in the new vocabulary."""

    parts: tuple[Part, ...]
    """The table of every model."""
    origins: Origins
    place: int
    """Which of the models this is."""
    columns: int
    """Elements of a row."""
    numbers: Numbers
    """The format in which means are taken."""
    gives_change: bool = False

    @property
    def path(self) -> Path:
        """See Part."""
        return self.parts[self.place].path

    @property
    def held(self) -> int:
        """See Part: the numbers of rows, and what the models' own parts hold."""
        return sum(part.held for part in self.parts) + 4 * self.origins.own.nbytes

    @cached_property
    def _runs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Rows that lie one behind the other in one model too: the first, the one after the last,
        their model, its row.
        """
        model, row = self.origins.of(self.place)
        follows = (model[1:] == model[:-1]) & (model[1:] != MEAN) & (model[1:] != PADDING)
        follows &= (row[1:] == row[:-1] + 1) | (model[1:] == ZERO)
        first = np.concatenate([[0], np.flatnonzero(~follows) + 1])
        return first, np.append(first[1:], model.size), model[first], row[first]

    def fill(self, start: int, out: np.ndarray, scratch: np.ndarray) -> None:
        """See Part."""
        stored, special = self._stored, []
        dtype = stored[0].tensor.dtype if stored else ""
        for first, model, row, place, stop in self._within(start, out.size):
            offset = start + place - first * self.columns
            if model < 0:
                special.append((first, model, offset, place, stop))
            elif dtype:  # only its bytes now: there may be a run for every row
                size = DTYPES[dtype][0]
                raw = scratch[place * size : stop * size]
                stored[model].read(row * self.columns + offset, raw)
            else:
                self.parts[model].fill(row * self.columns + offset, out[place:stop], scratch)
        if dtype:
            widen(scratch[: out.size * DTYPES[dtype][0]], dtype, out)
        for first, model, offset, place, stop in special:
            if model == ZERO:
                out[place:stop] = 0
            elif model == MEAN:
                self._mean(first, offset, out[place:stop], scratch)
            else:
                out[place:stop] = self._padding[offset : offset + stop - place]

    def _within(self, start: int, count: int) -> Iterator[tuple[int, int, int, int, int]]:
        """The runs of `count` elements from `start` on: the first row, the model, its row, and
        from where to where in the elements.
        """
        firsts, ends, models, rows = self._runs
        begins, stops = firsts * self.columns - start, ends * self.columns - start
        low = int(np.searchsorted(begins, 0, "right")) - 1
        cut = slice(low, int(np.searchsorted(begins, count)))
        places, stops = np.maximum(begins[cut], 0), np.minimum(stops[cut], count)
        parts = (firsts[cut], models[cut], rows[cut], places, stops)
        yield from zip(*(part.tolist() for part in parts), strict=True)

    @cached_property
    def _stored(self) -> list[StoredPart]:
        """The tables, where all are no more than stored and in one type; none otherwise."""
        stored = [part for part in self.parts if isinstance(part, StoredPart)]
        alike = len({part.tensor.dtype for part in stored}) == 1
        return stored if alike and len(stored) == len(self.parts) else []

    def origin(self, element: int) -> tuple[Path, int]:
        """Where one element is from: the model, and the element of its own table."""
        token, column = divmod(element, self.columns)
        model, row = (int(one[token]) for one in self.origins.of(self.place))
        if model == MEAN:  # of the first that is not a number
            value, scratch = np.zeros(1, np.float32), np.empty(8, np.uint8)
            for number, own in enumerate(self.origins.own[:, token]):
                if own >= 0 and not np.isnan(value[0]):
                    model, row = number, int(own)
                    self.parts[model].fill(row * self.columns + column, value, scratch)
        if model < 0:
            return self.path, element
        return self.parts[model].path, row * self.columns + column

    def _mean(self, token: int, offset: int, out: np.ndarray, scratch: np.ndarray) -> None:
        """out (n,) = the mean of the models that have the token, added up in their order."""
        n, total, count = self.numbers, np.zeros_like(out), 0
        for part, row in zip(self.parts, self.origins.own[:, token], strict=True):
            if row >= 0:
                part.fill(int(row) * self.columns + offset, out, scratch)
                total = n.add(total, n.read(out))
                count += 1
        out[:] = n.div(total, out.dtype.type(count))

    @cached_property
    def _padding(self) -> np.ndarray:
        """(columns,) the mean of all rows of tokens, summed in float64, in the format."""
        total = np.zeros(self.columns)
        row = np.empty(self.columns, self.numbers.work)
        scratch = np.empty(8 * self.columns, np.uint8)
        count = self.origins.given.size
        for i in range(count):
            self.fill(i * self.columns, row, scratch)
            total += self.numbers.read(row)
        return self.numbers.of(total / count)
