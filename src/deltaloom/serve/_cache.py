"""A key-value cache of rows that come and go: each row as long as it is, none padded on its left.

Rows 0 to n lie together, so that a batch is a slice. A row's tokens begin at place 0; what lies
behind its end is hidden by the mask and overwritten by later tokens. It is never another row's: a
place that is not finite would reach through a weight of zero, so a row that is taken up is cleared.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

WIDTH = 64
"""Places that a row grows by at least. Ours."""

Prefix = Sequence[tuple[Tensor, Tensor]]
"""Keys and values of each layer, `(k, h, d)`, that come before a row's first token."""


class _Layer(CacheLayerMixin):
    """One layer's keys and values, `(rows * width, h, d)`: written at given places."""

    is_sliding = False
    is_compileable = False

    def __init__(self, owner: RowCache) -> None:
        super().__init__()
        self.owner = owner

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make room for all rows."""
        places = self.owner.rows * self.owner.width
        for name, like in (("keys", key_states), ("values", value_states)):
            setattr(self, name, like.new_zeros(places, like.shape[1], like.shape[3]))
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Write `(b, h, q, d)` and give what the batch's rows hold, `(b, h, T, d)`."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return (self._write(self.keys, key_states), self._write(self.values, value_states))

    def _write(self, held: Any, new: Tensor) -> Tensor:
        owner = self.owner
        held.index_copy_(0, owner.places.to(held.device), new.transpose(1, 2).flatten(0, 1))
        rows = held.view(owner.rows, owner.width, *held.shape[1:])
        return rows[owner.first : owner.end, : owner.seen].transpose(1, 2)

    def resize(self, rows: int, width: int) -> None:
        """Move what is held into a larger table."""
        if not self.is_initialized:
            return
        before = self.owner
        for name in ("keys", "values"):
            held: Any = getattr(self, name)
            new = held.new_zeros(rows, width, *held.shape[1:])
            new[: before.rows, : before.width] = held.view(
                before.rows, before.width, *held.shape[1:]
            )
            setattr(self, name, new.flatten(0, 1))

    def swap(self, a: int, b: int, length: int) -> None:
        """Exchange the first `length` places of two rows."""
        for held in (self.keys, self.values) if self.is_initialized else ():
            rows: Any = held.view(self.owner.rows, self.owner.width, *held.shape[1:])  # pyright: ignore
            kept = rows[a, :length].clone()
            rows[a, :length] = rows[b, :length]
            rows[b, :length] = kept

    def clear(self, row: int, length: int) -> None:
        """Zero the first `length` places of a row."""
        start = row * self.owner.width
        for held in (self.keys, self.values) if self.is_initialized else ():
            held[start : start + length] = 0  # pyright: ignore

    def fill(self, row: int, keys: Tensor, values: Tensor) -> None:
        """Begin `row` with `(k, h, d)` keys and values."""
        if not self.is_initialized:
            self.lazy_initialization(keys.transpose(0, 1)[None], values.transpose(0, 1)[None])
        start = row * self.owner.width
        for held, new in ((self.keys, keys), (self.values, values)):
            held[start : start + len(new)] = new  # pyright: ignore

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Places seen, and where they begin."""
        return self.owner.seen, 0

    def get_seq_length(self) -> int:
        """Places seen before this step: zero, as each row has its own."""
        return 0

    def get_max_length(self) -> int:
        """No bound."""
        return -1

    def get_max_cache_shape(self) -> int:
        """No bound; the older name."""
        return -1


class RowCache(Cache):
    """Keys and values of rows; the table grows as it is needed, to at most `most` rows."""

    def __init__(self, layers: int, device: torch.device, most: int) -> None:
        super().__init__(layers=[_Layer(self) for _ in range(layers)])
        self.own: list[_Layer] = self.layers  # pyright: ignore
        self.device, self.most = device, most
        self.rows, self.width = 0, 0
        self.first = self.end = self.seen = 0
        self.places = torch.zeros(0, dtype=torch.long)
        self._reach: list[int] = []
        """By row: places that may have been written."""

    def step(self, first: int, positions: Tensor, seen: int) -> None:
        """The next pass is over rows from `first`, at `positions` `(b, q)`; they see `seen`."""
        self.first, self.end, self.seen = first, first + len(positions), seen
        ends = (positions[:, -1] + 1).tolist()
        self._reserve(self.end, max(ends))
        for row, end in zip(range(first, self.end), ends, strict=True):
            self._reach[row] = max(self._reach[row], end)
        rows = torch.arange(first, self.end)[:, None]
        self.places = (rows * self.width + positions).flatten().to(self.device)

    def begin(self, row: int, prefix: Prefix = ()) -> None:
        """Take a row up: clear it, and put keys and values that were computed before into it."""
        length = len(prefix[0][0]) if prefix else 0
        self._reserve(row + 1, length)
        for number, layer in enumerate(self.own):
            layer.clear(row, self._reach[row])
            if prefix:
                layer.fill(row, *prefix[number])
        self._reach[row] = length

    def swap(self, a: int, b: int) -> None:
        """Exchange two rows."""
        if a != b:
            length = max(self._reach[a], self._reach[b])
            for layer in self.own:
                layer.swap(a, b, length)
            self._reach[a], self._reach[b] = self._reach[b], self._reach[a]

    def release(self) -> None:
        """Give the memory back; nothing is held afterwards."""
        for layer in self.own:
            layer.keys = layer.values = None  # pyright: ignore
            layer.is_initialized = False
        self.rows, self.width, self._reach = 0, 0, []

    def _reserve(self, rows: int, width: int) -> None:
        if rows <= self.rows and width <= self.width:
            return
        if rows > self.rows:
            rows = max(rows, min(2 * self.rows, self.most))
        if width > self.width:
            width = -(-max(width, self.width * 5 // 4) // WIDTH) * WIDTH
        rows, width = max(rows, self.rows), max(width, self.width)
        for layer in self.own:
            layer.resize(rows, width)
        self._reach += [0] * (rows - self.rows)
        self.rows, self.width = rows, width
