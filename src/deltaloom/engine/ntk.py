"""Empirical neural tangent kernels of any module: Gram matrices of per-row gradients.

K[i, c, j, d] = <grad f_c(x_i), grad f_d(x_j)> over the named parameters, or with the sign taken of
both gradients or of one. One backward pass per row and output (rows in batches) and a matrix
product, where one Jacobian-vector product per pair would be n m passes.

Memory. The side with fewer rows is held, the other goes by. What goes by is met parameter by
parameter inside its backward pass, so that never more than one parameter's gradients of one batch
exist. What is held is cut into blocks of at most `memory` bytes (at least one batch), and the
other side passes once per block: n + m ceil(n / block) rows differentiated, half of it when both
sides are the same. A plain kernel that would need several blocks keeps a linear module's
gradients as their factors, T (m + n) floats a row for a weight (m, n), where these are smaller.

Limits. What `engine.taps` cannot tap (batch norms, routed experts, weights read outside their
module) has no kernel here. The model must be in evaluation mode: dropout would draw a new function
for each pass. Gradients are float32 for float32 and 16-bit models (the passes themselves run in
the model's type), products are float32 within a parameter and float64 across; a float64 model is
float64 throughout. Sign kernels count entries that are zero but for rounding as full signs: the
bias of attention keys, whose gradient softmax cancels, is the usual case; leave it out. A kernel
is of the function at these weights: whether training follows it is a question to be measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, pairwise
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from deltaloom.engine._differentiate import differentiate, factors, flat
from deltaloom.engine.taps import Rows, Taps

Kind = Literal["sgd", "sign", "asymmetric", "flipped"]
"""Whose gradients are replaced by their signs: none, both, the left rows', the right rows'."""
SIGNED: dict[Kind, tuple[bool, bool]] = {
    "sgd": (False, False),
    "sign": (True, True),
    "asymmetric": (True, False),
    "flipped": (False, True),
}
MEMORY = 2**30
"""Bytes of gradients held at once. Ours."""

Outputs = Callable[[Any], Tensor]
"""Calls the model once on a batch and returns (b, k): k scalar functions of each row."""
Kernels = dict[Kind, NDArray[np.float64]]
"""A kernel (n, k, m, k') of each kind."""
Signs = tuple[bool, bool]
"""Whether the held and the passing rows' gradients are replaced by their signs."""
Batches = Sequence[Any]
"""A tensor, or a mapping or sequence whose first tensor has the batch's rows in dimension 0."""


def gram(
    model: nn.Module,
    left: Batches,
    right: Batches,
    outputs: Outputs,
    kind: Kind = "sgd",
    *,
    names: Sequence[str] | None = None,
    memory: int = MEMORY,
) -> NDArray[np.float64]:
    """The kernel (n, k, m, k') of the rows of `left` and `right`; half the work if they are one.

    Args:
        model: Any module, in evaluation mode.
        left: Batches of rows.
        right: Batches of rows, or the same object as `left`.
        outputs: What is differentiated, (b, k) for a batch; k is the same for all of a side.
        kind: Which side's gradients are replaced by their signs.
        names: Parameters to differentiate by; None is those that require gradients.
        memory: Bytes of gradients held at once.

    Raises:
        InputError: A parameter has no gradient per row (see `engine.taps`).
        ValueError: An unknown kind.
    """
    return grams(model, left, right, outputs, [kind], names=names, memory=memory)[kind]


def grams(
    model: nn.Module,
    left: Batches,
    right: Batches,
    outputs: Outputs,
    kinds: Sequence[Kind],
    *,
    names: Sequence[str] | None = None,
    memory: int = MEMORY,
) -> Kernels:
    """`gram` of several kinds from the same backward passes."""
    if unknown := [kind for kind in kinds if kind not in get_args(Kind)]:
        raise ValueError(f"kind = {unknown[0]!r}: must be one of {', '.join(get_args(Kind))}")
    with Taps(model, names) as taps:
        if right is left:
            return _Square(taps, outputs, left, memory).fill(kinds)
        if _count(right) < _count(left):
            found = _Oblong(taps, outputs, right, left, memory).fill([_turned(k) for k in kinds])
            return {kind: found[_turned(kind)].transpose(2, 3, 0, 1) for kind in kinds}
        return _Oblong(taps, outputs, left, right, memory).fill(kinds)


def along(
    model: nn.Module, batches: Batches, outputs: Outputs, direction: Mapping[str, Tensor]
) -> NDArray[np.float64]:
    """Directional derivatives (n, k): how the outputs change, to first order, along `direction`.

    `direction` maps parameter names to tensors of their shapes; all others stay.
    """
    found = []
    with Taps(model, [*direction]) as taps:
        for batch in batches:
            values = outputs(batch)  # (b, k)
            slopes = torch.zeros(values.shape, dtype=torch.float64)

            def add(output: int, name: str, rows: Rows, slopes: Tensor = slopes) -> None:
                g = flat(rows)  # (b, D)
                slopes[:, output] += (g @ direction[name].to(g).flatten()).cpu().double()

            differentiate(taps, values, add)
            found.append(slopes.numpy())
    return np.concatenate(found)


def gradients(
    model: nn.Module, batch: Any, outputs: Outputs, names: Sequence[str]
) -> dict[str, Tensor]:
    """Every row's gradients themselves, (b, k, D) per parameter: b k times the parameters' size."""
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    with Taps(model, names) as taps:
        differentiate(
            taps, outputs(batch), lambda output, name, rows: found[name].append(flat(rows))
        )
    return {name: torch.stack(parts, 1) for name, parts in found.items()}


def _turned(kind: Kind) -> Kind:
    """The kind of the transposed kernel."""
    turned: dict[Kind, Kind] = {"asymmetric": "flipped", "flipped": "asymmetric"}
    return turned.get(kind, kind)


def _rows(batch: Any) -> int:
    if isinstance(batch, Tensor):
        return len(batch)
    values: Iterable[Any] = batch.values() if isinstance(batch, Mapping) else batch
    return next(len(value) for value in values if isinstance(value, Tensor))


def _count(batches: Batches) -> int:
    return sum(map(_rows, batches))


def _places(batches: Batches) -> list[slice]:
    """Where each batch's rows are among all."""
    ends = np.cumsum([0, *map(_rows, batches)]).tolist()
    return [slice(a, b) for a, b in pairwise(ends)]


class _Block:
    """Gradients of some rows of the held side: whole, or as factors where `compact`."""

    def __init__(self, signs: frozenset[bool], compact: bool) -> None:
        self.signs, self.compact = signs, compact
        self.rows = 0
        """Rows times outputs held."""
        self.size = 0
        """Bytes held."""
        self._parts: dict[str, list[list[Tensor]]] = {}  # name -> batch -> output -> (b, D)
        self._pairs: dict[str, list[tuple[slice, Tensor, Tensor]]] = {}  # rows k + c, (b, T, *)
        self._held: dict[tuple[str, bool], Tensor] = {}  # name, signed -> (rows k, D)

    def add(self, taps: Taps, values: Tensor) -> None:
        """Differentiate a batch's outputs (b, k), at least one of them, and keep what comes."""
        outputs = values.shape[1]

        def take(output: int, name: str, rows: Rows) -> None:
            if self._factored(name, rows, math.prod(taps.shapes[name])):
                self._keep_factors(name, slice(start + output, stop, outputs), rows)
                return
            whole = flat(rows)
            self.size += whole.nbytes * len(self.signs)
            batches = self._parts.setdefault(name, [])
            if output == 0:
                batches.append([])
            batches[-1].append(whole)

        start, stop = self.rows, self.rows + values.numel()
        differentiate(taps, values, take)
        self.rows = stop

    def _factored(self, name: str, rows: Rows, entries: int) -> bool:
        """Whether a parameter is held as factors, which its first batch decides by size."""
        if not self.compact or rows.left is None or rows.right is None or name in self._parts:
            return False
        small = rows.left.numel() + rows.right.numel() < entries * len(rows.left)
        return name in self._pairs or small

    def _keep_factors(self, name: str, place: slice, rows: Rows) -> None:
        left, right = factors(rows)
        self.size += left.nbytes + right.nbytes
        self._pairs.setdefault(name, []).append((place, left, right))

    def close(self) -> None:
        """Put the rows of all batches together, parameter by parameter, and take signs."""
        for name in [*self._parts]:
            parts = [torch.stack(outputs, 1).flatten(0, 1) for outputs in self._parts.pop(name)]
            whole = torch.cat(parts)  # (rows k, D)
            for signed in self.signs:
                self._held[name, signed] = whole.sign() if signed else whole

    def meet(self, name: str, rows: Rows, pairs: Iterable[Signs]) -> Iterator[Tensor]:
        """Products (rows k, b) with the rows that go by, for each pair (held, passing) of signs."""
        if name in self._pairs:
            yield self._meet_factors(name, rows)
            return
        whole = flat(rows)
        passing = {signed: whole.sign() if signed else whole for signed in {b for _, b in pairs}}
        for a, b in pairs:
            yield (self._held[name, a] @ passing[b].T).cpu().double()

    def _meet_factors(self, name: str, rows: Rows) -> Tensor:
        left, right = factors(rows)
        found = torch.zeros(self.rows, len(left), dtype=torch.float64)
        for place, own_left, own_right in self._pairs[name]:
            found[place] = _of_factors(own_left, own_right, left, right).cpu().double()
        return found

    def own(self, pairs: Iterable[Signs]) -> dict[Signs, Tensor]:
        """The products (rows k, rows k) of the held rows among themselves."""
        found: dict[Signs, Tensor] = {}
        for a, b in pairs:
            if (b, a) in found:
                found[a, b] = found[b, a].T
                continue
            total = found[a, b] = torch.zeros(self.rows, self.rows, dtype=torch.float64)
            for name in dict.fromkeys(name for name, _ in self._held):  # always in one order
                total += (self._held[name, a] @ self._held[name, b].T).cpu().double()
            for held in self._pairs.values():
                for place, *own in held:
                    for other, *others in held:
                        total[place, other] += _of_factors(*own, *others).cpu().double()
        return found


def _of_factors(left: Tensor, right: Tensor, left2: Tensor, right2: Tensor) -> Tensor:
    """(a, b): inner products of sum_t left_t right_t' of a rows with those of b rows."""
    shape = (*left.shape[:2], *left2.shape[:2])  # (a, T, b, S)
    lefts, rights = (
        x.flatten(0, 1) @ y.flatten(0, 1).T for x, y in ((left, left2), (right, right2))
    )
    return (lefts * rights).view(shape).sum((1, 3))


class _Kernel:
    """What both shapes share: one side held in blocks, the other going by."""

    def __init__(
        self, taps: Taps, outputs: Outputs, held: Batches, passing: Batches, memory: int
    ) -> None:
        self.taps, self.outputs, self.memory = taps, outputs, memory
        self.held, self.passing = held, passing
        with torch.no_grad():
            first, other = outputs(held[0]), outputs(passing[0])
        self.shape = (_count(held), first.shape[1], _count(passing), other.shape[1])
        self.bytes = math.prod(self.shape[:2]) * taps.size * max(4, first.element_size())

    def blocks(self, pairs: Sequence[Signs]) -> Iterator[tuple[_Block, slice, int]]:
        """Each block with its rows and the number of batches up to its end."""
        signs = frozenset(held for held, _ in pairs)
        compact = not any(map(any, pairs)) and self.bytes > self.memory
        places, done = _places(self.held), 0
        while done < len(self.held):
            block, start = _Block(signs, compact), places[done].start
            while done < len(self.held) and (not block.rows or block.size < self.memory):
                block.add(self.taps, self.outputs(self.held[done]))
                done += 1
            block.close()
            yield block, slice(start, places[done - 1].stop), done

    def products(
        self, block: _Block, batch: Any, pairs: Sequence[Signs]
    ) -> dict[Signs, NDArray[np.float64]]:
        """(rows, k, b, k') for each pair (held, passing) of signs."""
        values = self.outputs(batch)  # (b, k')
        totals = {
            pair: torch.zeros(block.rows, *values.shape, dtype=torch.float64) for pair in pairs
        }

        def take(output: int, name: str, rows: Rows) -> None:
            met = block.meet(name, rows, pairs)
            for total, product in zip(totals.values(), met, strict=True):
                total[:, :, output] += product

        differentiate(self.taps, values, take)
        k = self.shape[1]
        return {pair: total.unflatten(0, (-1, k)).numpy() for pair, total in totals.items()}


class _Oblong(_Kernel):
    """Two different sides, the left one held."""

    def fill(self, kinds: Sequence[Kind]) -> Kernels:
        found: Kernels = {kind: np.zeros(self.shape) for kind in kinds}
        pairs = list(dict.fromkeys(SIGNED[kind] for kind in kinds))
        for block, rows, _ in self.blocks(pairs):
            for batch, columns in zip(self.passing, _places(self.passing), strict=True):
                products = self.products(block, batch, pairs)
                for kind in kinds:
                    found[kind][rows, :, columns] = products[SIGNED[kind]]
        return found


class _Square(_Kernel):
    """One side with itself: blocks meet only the batches after them."""

    def __init__(self, taps: Taps, outputs: Outputs, batches: Batches, memory: int) -> None:
        super().__init__(taps, outputs, batches, batches, memory)

    def fill(self, kinds: Sequence[Kind]) -> Kernels:
        found: Kernels = {kind: np.zeros(self.shape) for kind in kinds}
        # Below the diagonal stands the transposed product of the other side's signs.
        both = ((SIGNED[kind], SIGNED[_turned(kind)]) for kind in kinds)
        pairs = list(dict.fromkeys(chain.from_iterable(both)))
        places = _places(self.held)
        for block, rows, done in self.blocks(pairs):
            own = block.own(pairs)
            shape = (rows.stop - rows.start, self.shape[1]) * 2
            for kind in kinds:
                found[kind][rows, :, rows] = own[SIGNED[kind]].reshape(shape).numpy()
            for number in range(done, len(self.held)):
                products = self.products(block, self.held[number], pairs)
                for kind in kinds:
                    columns, (a, b) = places[number], SIGNED[kind]
                    found[kind][rows, :, columns] = products[a, b]
                    found[kind][columns, :, rows] = products[b, a].transpose(2, 3, 0, 1)
        return found
