"""A tangent kernel in two maps to be shared: gradients of blocks of rows, then their products.

`engine.ntk` holds one side's gradients while the other side goes by; cut among workers, each would
differentiate the other side again. Here every row is differentiated once and its gradients are
written down, and a tile of the kernel is the product of two blocks of them. What may be written is
bounded, so the gradients' entries are cut into slabs, done one after the other: a kernel is a sum
over entries. Each slab beyond the first costs a forward pass, and a backward pass as far as its
first parameter.

As in `engine.ntk`, products are float32 within a parameter and float64 across.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from deltaloom.engine._differentiate import differentiate, flat
from deltaloom.engine.ntk import SIGNED, Kernels, Kind, Outputs, Signs
from deltaloom.engine.taps import Rows, Taps


class Part(NamedTuple):
    """Entries [start, stop) of a parameter, flattened."""

    name: str
    start: int
    stop: int


def slabs(sizes: Mapping[str, int], entries: int) -> list[list[Part]]:
    """All parameters' entries, in order, in slabs of `entries`; the last may be smaller."""
    found: list[list[Part]] = [[]]
    room = entries
    for name, size in sizes.items():
        start = 0
        while start < size:
            if not room:
                found.append([])
                room = entries
            stop = min(size, start + room)
            found[-1].append(Part(name, start, stop))
            room -= stop - start
            start = stop
    return found


def width_of(slab: Sequence[Part]) -> int:
    """d: entries of a slab."""
    return sum(part.stop - part.start for part in slab)


def slab_gradients(model: nn.Module, batch: Any, outputs: Outputs, slab: Sequence[Part]) -> Tensor:
    """The slab's entries of the gradients of a batch, (b, k, d) float32 on the CPU.

    Beside them only one parameter's gradients of one output exist at a time.
    """
    places, at = {}, 0
    for part in slab:
        places[part.name] = slice(at, at + part.stop - part.start), slice(part.start, part.stop)
        at = places[part.name][0].stop
    with Taps(model, [*places]) as taps:
        values = outputs(batch)  # (b, k)
        found = torch.empty(*values.shape, at)

        def take(output: int, name: str, rows: Rows) -> None:
            own, of_parameter = places[name]
            found[:, output, own] = flat(rows)[:, of_parameter].float().cpu()

        differentiate(taps, values, take)
    return found


def signs_of(kinds: Iterable[Kind]) -> list[Signs]:
    """The products that these kernels need: above the diagonal, and turned round below it."""
    plain = [SIGNED[kind] for kind in kinds]
    return list(dict.fromkeys([*plain, *((b, a) for a, b in plain)]))


def tile(
    left: NDArray[np.float32],
    right: NDArray[np.float32],
    slab: Sequence[Part],
    signs: Iterable[Signs],
    device: str = "cpu",
) -> dict[Signs, NDArray[np.float64]]:
    """Products (a, b) of the gradients (a, d) and (b, d) of two blocks, for each pair of signs."""
    found = {pair: np.zeros((len(left), len(right))) for pair in signs}
    kinds = {signed for pair in found for signed in pair}
    at = 0
    for part in slab:
        columns = slice(at, at + part.stop - part.start)
        at = columns.stop
        sides = [_tensor(block[:, columns], device) for block in (left, right)]
        given = {signed: [x.sign() if signed else x for x in sides] for signed in kinds}
        for a, b in found:
            found[a, b] += (given[a][0] @ given[b][1].T).cpu().numpy()
    return found


def _tensor(block: NDArray[np.float32], device: str) -> Tensor:
    """The block on `device`; on the CPU it stays where it is, in a mapped file."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(block).to(device)


def add_tile(
    kernels: Kernels, rows: range, columns: range, products: Mapping[Signs, NDArray[np.float64]]
) -> None:
    """Add the tile (rows, k, columns, k) and its mirror image to kernels (n, k, m, k), n <= m.

    What lies below the kernels' last row is left out.
    """
    for kind, kernel in kernels.items():
        n, k = kernel.shape[:2]
        a, b = SIGNED[kind]
        sides = [(rows, columns, products[a, b])]
        if rows != columns:
            sides.append((columns, rows, products[b, a].T))
        for down, across, product in sides:
            part = product.reshape(len(down), k, len(across), k)[: max(0, n - down.start)]
            kernel[down.start : down.stop, :, across.start : across.stop] += part
