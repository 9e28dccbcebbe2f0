"""Orthogonal matching pursuit of many vectors over one dictionary.

Exact, in two ways. Where the atoms' Gram matrix fits (`GRAM_BYTES`), each vector is pursued alone
by products: a run of picks is made among the few hundred atoms of the largest products, then the
products of all atoms after each of these picks come from one matrix product with the rows of the
Gram matrix that it needs; where an atom outside would have won, the picks from there on are taken
back and made again. That reads a few rows per pick where the plain form reads all atoms. Else
blocks of vectors are pursued together, with all products anew after every pick.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

GRAM_BYTES = 2**31
"""Largest Gram matrix: 23,170 atoms in float32 (ours)."""
NEAR, RUN = 512, 16
"""Atoms that a run of picks looks at, and picks in a run (ours, by time at 18,770 atoms)."""
TOGETHER = 256
"""Vectors whose products are held at once (ours)."""
DEPENDENT = 1e-6
"""A pick with less than this share of its square outside the span of the others ends a sum."""
NOTHING = 1e-6
"""As does a largest product that is smaller than this share of the first."""


ROUNDING = 1e-5
"""By how much a product must exceed the picked one's to count as larger."""

Array = np.ndarray


class Pursuit:
    """A dictionary of atoms (m, e), ready for vectors."""

    def __init__(self, atoms: Tensor, k: int, *, normalise: bool = True) -> None:
        self.k = k
        atoms = atoms.float()
        lengths = atoms.norm(dim=1) if normalise else torch.ones(len(atoms))
        # An atom of length nothing has no direction, and is never picked.
        self.lengths = torch.where(lengths == 0, 1.0, lengths)
        self.atoms = atoms / self.lengths[:, None]
        fits = 4 * len(atoms) ** 2 <= GRAM_BYTES
        self.gram = (self.atoms @ self.atoms.T).numpy() if fits else None

    def sums(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Places of atoms and their factors, (n, k) each, for vectors (n, e); unused places are 0
        with a factor of 0.
        """
        found = [
            self._block(vectors[start : start + TOGETHER].float())
            for start in range(0, len(vectors), TOGETHER)
        ]
        places = torch.cat([one[0] for one in found])
        return places, torch.cat([one[1] for one in found]) / self.lengths.double()[places]

    def _block(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        if self.gram is None:
            return together(vectors, self.atoms, self.k)
        products = (vectors @ self.atoms.T).numpy()
        places = np.zeros((len(vectors), self.k), np.int64)
        factors = np.zeros(places.shape)
        near = min(NEAR, len(self.atoms))
        for one, first in enumerate(products):
            by_products(first, self.gram, near, RUN, places[one], factors[one])
        return torch.from_numpy(places), torch.from_numpy(factors)


def by_products(
    first: Array, gram: Array, near: int, run: int, places: Array, factors: Array
) -> None:
    """Fill places and factors (k,) of one vector from its products first (m,) with the atoms whose
    Gram matrix is (m, m), both float32; picks are made in runs among `near` atoms.
    """
    k = len(places)
    rows = np.empty((k, len(first)), np.float32)  # the Gram matrix's rows of the picks
    factor = np.zeros((k, k))  # of the picks' own Gram matrix, lower, L L' = G_SS
    half = np.zeros(k)  # L half = products of the picks with the vector
    now, done = first, 0
    floor = NOTHING * float(np.abs(first).max())
    while done < k:
        start, count = done, min(run, k - done)
        pool = np.sort(np.argpartition(np.abs(now), len(now) - near)[len(now) - near :])
        among = np.empty((start + count, near), np.float32)
        among[:start] = rows[:start, pool]
        weights, limits = np.zeros((count, start + count), np.float32), np.zeros(count)
        done = run_of_picks(
            first[pool], now[pool], gram, pool, floor, start, places, factor, half, among, weights,
            limits,
        )  # fmt: skip
        if done == start:  # nothing is left of the vector, or only atoms that the picks span
            break
        rows[start:done] = gram[places[start:done]]
        parts = weights[: done - start, :done] @ rows[:done]  # (picks, m)
        done = start + first_above(first, parts, limits)
        now = first - parts[done - start - 1]
        now[places[:done]] = 0.0
    places[done:] = 0
    factors[:done] = solved(factor, half, done)


@njit(nogil=True, cache=True)
def run_of_picks(
    known: Array, now: Array, gram: Array, pool: Array, floor: float, start: int, picks: Array,
    factor: Array, half: Array, among: Array, weights: Array, limits: Array,
) -> int:  # fmt: skip
    """Pick up to len(limits) atoms of `pool` (p,), whose products were `known` (p,) at first and
    are `now` (p,); returns how many picks there are in all.

    Written are picks (k,), factor (k, k), half (k,), the Gram matrix's rows among the pool, and by
    pick of this run its product (limits) and the factors of all picks after it (weights).
    """
    products = now.copy()
    free = np.ones(len(pool), np.bool_)
    done = start
    while done < start + len(limits):
        best, place = -1.0, -1
        for p in range(len(pool)):
            if free[p] and abs(products[p]) > best:
                best, place = abs(products[p]), p
        if place < 0 or best <= floor:
            return done
        free[place] = False
        atom = pool[place]
        line = factor[done]
        rest = float(gram[atom, atom])
        for i in range(done):
            value = float(gram[atom, picks[i]])
            for j in range(i):
                value -= factor[i, j] * line[j]
            line[i] = value / factor[i, i]
            rest -= line[i] * line[i]
        if rest <= DEPENDENT * gram[atom, atom]:
            return done
        line[done] = np.sqrt(rest)
        value = float(known[place])
        for j in range(done):
            value -= line[j] * half[j]
        half[done] = value / line[done]
        limits[done - start] = best
        picks[done] = atom
        for p in range(len(pool)):
            among[done, p] = gram[atom, pool[p]]
        done += 1
        found = solved(factor, half, done)
        for p in range(len(pool)):
            products[p] = known[p]
        for j in range(done):
            share = np.float32(found[j])
            weights[done - 1 - start, j] = share
            for p in range(len(pool)):
                products[p] -= share * among[j, p]
    return done


@njit(nogil=True, cache=True)
def solved(factor: Array, half: Array, count: int) -> Array:
    """c with L' c = half, (count,)."""
    found = half[:count].copy()
    for i in range(count - 1, -1, -1):
        found[i] /= factor[i, i]
        for j in range(i):
            found[j] -= factor[i, j] * found[i]
    return found


@njit(nogil=True, cache=True)
def first_above(first: Array, parts: Array, limits: Array) -> int:
    """How many picks hold: the first (of those after the first one) that was smaller than a product
    of any atom after the pick before it, first (m,) - parts (picks, m); len(parts) when all hold.
    """
    for step in range(len(parts) - 1):
        bound = np.float32(limits[step + 1] * (1 + ROUNDING))
        above = 0
        for i in range(len(first)):
            above |= abs(first[i] - parts[step, i]) > bound
        if above != 0:
            return step + 1
    return len(parts)


def together(vectors: Tensor, atoms: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Places and factors (b, k) for vectors (b, e), all pursued at once; atoms (m, e)."""
    count, device = len(vectors), vectors.device
    places = torch.zeros(count, k, dtype=torch.long, device=device)
    factor = torch.eye(k, dtype=torch.float64, device=device).repeat(count, 1, 1)
    half = torch.zeros(count, k, dtype=torch.float64, device=device)
    open_ = torch.ones(count, dtype=torch.bool, device=device)
    residual, everyone = vectors, torch.arange(count, device=device)
    floor = None
    for step in range(k):
        sizes = (residual @ atoms.T).abs()
        sizes.scatter_(1, places[:, :step], -1.0)
        best, pick = sizes.max(dim=1)
        floor = NOTHING * best if floor is None else floor
        picked = atoms[pick]
        before = atoms[places[:, :step]]  # (b, step, e)
        cross = torch.bmm(before, picked[:, :, None]).double()
        line = torch.linalg.solve_triangular(factor[:, :step, :step], cross, upper=False)[..., 0]
        square = picked.square().sum(1).double()
        rest = square - line.square().sum(1)
        open_ &= (best > floor) & (rest > DEPENDENT * square)
        if not open_.any():
            break
        product = (picked * vectors).sum(1).double()
        own = rest.clamp(min=0).sqrt()
        value = (product - (line * half[:, :step]).sum(1)) / own
        kept = everyone[open_]
        places[kept, step] = pick[kept]
        factor[kept, step, :step], factor[kept, step, step] = line[kept], own[kept]
        half[kept, step] = value[kept]
        solved = _coefficients(factor[:, : step + 1, : step + 1], half[:, : step + 1])
        parts = torch.bmm(solved[:, None].to(atoms.dtype), atoms[places[:, : step + 1]])
        residual = vectors - parts[:, 0]
    found = _coefficients(factor, half)
    return places.cpu(), found.cpu()


def _coefficients(factor: Tensor, half: Tensor) -> Tensor:
    """c (b, s) with L' c = half; closed sums have 0 behind their picks."""
    return torch.linalg.solve_triangular(factor.mT, half[..., None], upper=True)[..., 0]
