"""Random projections of long gradients, the same for a seed on any machine, batch or device.

Inner products survive up to about 1 / sqrt(dim) (Johnson-Lindenstrauss). A projection takes one
parameter's gradients at a time and adds their images up, so the whole gradient need not exist.
Signs and buckets are a hash of (seed, parameter name, position), never of a generator's state.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from deltaloom.core.errors import InputError
from deltaloom.engine.preconditioning import Adam, Precondition
from deltaloom.engine.taps import Rows

BLOCK = 4096
"""Coordinates per block of a dense projection's matrix."""
Kind = Literal["sparse", "rademacher", "gaussian", "kronecker"]


class Projection(ABC):
    """A random linear map of all parameters' gradients, laid end to end, to `dim` numbers."""

    def __init__(self, dim: int, seed: int) -> None:
        self.dim, self.seed = dim, seed

    @abstractmethod
    def add(self, name: str, rows: Rows, out: Tensor, precondition: Precondition | None) -> None:
        """out (b, dim) float32 += the image of one parameter's rows, preconditioned first."""

    def bits(self, name: str, counter: np.ndarray) -> np.ndarray:
        """64 random bits, uint64, per position of this parameter."""
        text = f"{self.seed}\0{name}".encode()
        key = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
        return splitmix64(counter, key)


class Sparse(Projection):
    """One signed bucket per coordinate: the sparse Johnson-Lindenstrauss transform with s = 1.

    Source: Charikar, Chen, Farach-Colton 2002 (count sketch); Kane & Nelson 2014. Costs O(D) a
    row and keeps inner products as well as a dense sign matrix of the same width.
    """

    def __init__(self, dim: int, seed: int) -> None:
        super().__init__(dim, seed)
        self._codes: dict[str, np.ndarray] = {}
        self._placed: dict[str, tuple[Tensor, Tensor]] = {}

    def codes(self, name: str, size: int) -> np.ndarray:
        """(size,) bucket and sign of each coordinate: 2 * bucket + (1 where the sign is +)."""
        if name not in self._codes:
            bits = self.bits(name, np.arange(size, dtype=np.uint64))
            codes = (bits >> np.uint64(1)) % np.uint64(self.dim) << np.uint64(1)
            codes |= bits & np.uint64(1)
            self._codes[name] = codes.astype(np.uint16 if self.dim <= 1 << 15 else np.uint32)
        return self._codes[name]

    def add(self, name: str, rows: Rows, out: Tensor, precondition: Precondition | None) -> None:
        """See Projection."""
        gradients = rows.whole().flatten(1).float()  # (b, n)
        codes = self.codes(name, gradients.shape[1])
        if out.device.type == "cpu":
            from deltaloom.engine import _sketching

            if isinstance(precondition, Adam):
                m, v = precondition.moments(name)
                _sketching.add_adam(
                    gradients.numpy(),
                    m.numpy(),
                    v.numpy(),
                    *precondition.constants,
                    codes,
                    out.numpy(),
                )
                return
            if precondition is not None:
                gradients = precondition(name, gradients)
            _sketching.add(gradients.numpy(), codes, out.numpy())
            return
        if precondition is not None:
            gradients = precondition(name, gradients)
        if name not in self._placed:
            wide = torch.from_numpy(codes.astype(np.int32)).to(out.device)
            self._placed[name] = wide >> 1, (wide & 1).float() * 2 - 1
        buckets, signs = self._placed[name]
        out.index_add_(1, buckets, gradients * signs)


class Dense(Projection):
    """A full random matrix over sqrt(dim), of signs as LESS and TRAK use, or of normal numbers.

    The reference, and slow: O(D dim) a row, and the matrix is made anew for every batch.
    """

    def __init__(self, dim: int, seed: int, entries: Literal["rademacher", "gaussian"]) -> None:
        super().__init__(dim, seed)
        self.entries = entries

    def add(self, name: str, rows: Rows, out: Tensor, precondition: Precondition | None) -> None:
        """See Projection."""
        gradients = rows.whole().flatten(1).float()  # (b, n)
        if precondition is not None:
            gradients = precondition(name, gradients)
        columns = np.arange(self.dim, dtype=np.uint64)
        for start in range(0, gradients.shape[1], BLOCK):
            part = gradients[:, start : start + BLOCK]
            lines = np.arange(start, start + part.shape[1], dtype=np.uint64)[:, None]
            matrix = self._entries(self.bits(name, lines * np.uint64(self.dim) + columns))
            out += part @ torch.from_numpy(matrix).to(out.device) / self.dim**0.5

    def _entries(self, bits: np.ndarray) -> np.ndarray:
        """Float32 numbers of mean 0 and variance 1, one per 64 bits."""
        if self.entries == "rademacher":
            return (bits & np.uint64(1)).astype(np.float32) * 2 - 1
        # Box and Muller 1958, from the two halves of the bits
        radius = ((bits >> np.uint64(32)).astype(np.float64) + 1) / 2**32
        angle = (bits & np.uint64(0xFFFFFFFF)).astype(np.float64) / 2**32
        return (np.sqrt(-2 * np.log(radius)) * np.cos(2 * np.pi * angle)).astype(np.float32)


class Kronecker(Projection):
    """A (p, m) and a (q, n) sign matrix from both sides of every (m, n) gradient, p q = dim.

    Source: LoGra (Choe et al. 2024, arXiv 2405.13954), here summed over the modules
    into one image. Never forms the gradient: for full matrices of large models, and without
    preconditioning. On LoRA's thin factors it loses far more than `Sparse`; parameters that are
    no matrices go through `Sparse`.
    """

    def __init__(self, dim: int, seed: int) -> None:
        super().__init__(dim, seed)
        self.side = math.isqrt(dim)
        if self.side**2 != dim:
            raise InputError(f"dimension = {dim}: a kronecker projection needs a square, as 4096")
        self._sparse = Sparse(dim, seed)
        self._sides: dict[str, tuple[Tensor, Tensor]] = {}

    def add(self, name: str, rows: Rows, out: Tensor, precondition: Precondition | None) -> None:
        """See Projection; raises InputError with a precondition."""
        if precondition is not None:
            raise InputError("a kronecker projection cannot precondition; use projection=sparse")
        if rows.left is None or rows.right is None:
            whole = rows.whole()
            if whole.dim() != 3:
                return self._sparse.add(name, rows, out, None)
            left, right = whole.float(), torch.eye(whole.shape[2], device=whole.device)[None]
            left = left.transpose(1, 2)  # (b, n, m): sum over n of left_n right_n'
        else:
            left, right = rows.left.float(), rows.right.float()
        if name not in self._sides:
            a, b = (self._side(name, x.shape[-1], k) for k, x in enumerate((left, right)))
            self._sides[name] = a.to(out.device), b.to(out.device)
        a, b = self._sides[name]
        image = torch.matmul((left @ a).transpose(1, 2), right @ b)  # (b, p, q)
        out += image.flatten(1)
        return None

    def _side(self, name: str, size: int, which: int) -> Tensor:
        counter = np.arange(size * self.side, dtype=np.uint64).reshape(size, self.side)
        bits = self.bits(f"{name}\0{which}", counter) & np.uint64(1)
        return torch.from_numpy((bits.astype(np.float32) * 2 - 1) / self.side**0.5)


def projection(kind: Kind, dim: int, seed: int) -> Projection:
    """The projection of this name."""
    if kind == "sparse":
        return Sparse(dim, seed)
    if kind == "kronecker":
        return Kronecker(dim, seed)
    assert kind in get_args(Kind)
    return Dense(dim, seed, kind)


def splitmix64(counter: np.ndarray, seed: int) -> np.ndarray:
    """64 well-mixed bits per counter (Steele, Lea, Flood 2014), uint64 of the same shape."""
    with np.errstate(over="ignore"):
        golden = np.uint64(0x9E3779B97F4A7C15)
        # The seed is hashed on its own first, so that seeds do not shift each other's streams.
        start = _mix(np.array([seed], dtype=np.uint64) * golden + golden)[0]
        return _mix(counter * golden + start)


def _mix(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
