"""Which elements a sparse adapter gives up and which it takes: plain functions on one weight."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from deltaloom.core.adapters._sparse_product import Layout, dense_gradient

STRIP = 1 << 22
"""Elements of a dense matrix looked at a time: 16 MB of float32."""


class Exchange(NamedTuple):
    """What reselection does to one adapter of n elements."""

    leaving: Tensor
    """(m,) positions among the n elements that are replaced."""
    coming: Tensor
    """(m,) flat indices that take their places."""
    chosen: Tensor
    """(m,) positions of these among the candidates that were offered."""


def exchange(
    values: Tensor, indices: Tensor, count: int, offered: Tensor, scores: Tensor
) -> Exchange:
    """Drop the `count` elements of least |value|, grow as many of the best-scored candidates.

    values and indices (n,); offered and scores (c,), each index once. Candidates that stay active
    are passed over. An element that is dropped and grown again stays as it is. With fewer
    candidates than dropped elements, the least of these are replaced and the others stay. Equal
    values and scores count in their order.
    """
    order = torch.argsort(values.detach().abs(), stable=True)
    dropped, kept = order[:count], order[count:]
    free = (~torch.isin(offered, indices[kept])).nonzero().flatten()
    best = free[torch.argsort(scores[free], descending=True, stable=True)[:count]]
    again = torch.isin(indices[dropped], offered[best])
    leaving = dropped[~again]
    new = best[~torch.isin(offered[best], indices[dropped])]
    leaving = leaving[: len(new)]
    return Exchange(leaving, offered[new], new)


def largest_gradients(g: Tensor, x: Tensor, layout: Layout, count: int) -> Tensor:
    """Flat indices (count,) of the weight's largest |gradient|; a strip is dense at a time."""
    strips = (
        (start * layout.columns, dense_gradient(*_rows(g, x, layout, start, stop), layout).abs())
        for start, stop in _cuts(layout)
    )
    return _largest(strips, count)[0]


def largest_products(
    rows: Tensor, columns: Tensor, layout: Layout, active: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """Flat indices and values (count,) of the largest rows[i] * columns[j] outside `active`.

    rows (out,), columns (in,), active (n,) flat. A strip is dense at a time.
    """
    outer, inner = (columns, rows) if layout.transposed else (rows, columns)

    def strips() -> Iterator[tuple[int, Tensor]]:
        for start, stop in _cuts(layout):
            products = torch.outer(outer[start:stop], inner).flatten()
            low = start * layout.columns
            inside = (active >= low) & (active < stop * layout.columns)
            products[active[inside].long() - low] = -1.0
            yield low, products

    found, scores = _largest(strips(), count)
    return found[scores >= 0], scores[scores >= 0]


def _cuts(layout: Layout) -> Iterator[tuple[int, int]]:
    height = max(1, STRIP // layout.columns)
    for start in range(0, layout.rows, height):
        yield start, min(start + height, layout.rows)


def _rows(g: Tensor, x: Tensor, layout: Layout, start: int, stop: int) -> tuple[Tensor, Tensor]:
    return (g, x[:, start:stop]) if layout.transposed else (g[:, start:stop], x)


def _largest(strips: Iterator[tuple[int, Tensor]], count: int) -> tuple[Tensor, Tensor]:
    indices, scores = torch.empty(0, dtype=torch.int64), torch.empty(0)
    for low, strip in strips:
        flat = strip.flatten()
        top, places = flat.topk(min(count, len(flat)))
        scores = torch.cat([scores.to(top), top])
        indices = torch.cat([indices.to(top.device), places + low])
        keep = scores.argsort(descending=True, stable=True)[:count]
        scores, indices = scores[keep], indices[keep]
    return indices, scores
