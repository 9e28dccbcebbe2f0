"""Random projections of long vectors, the same for a seed on any machine, batch or device.

Inner products survive up to about 1 / sqrt(dim) (Johnson-Lindenstrauss). Signs and buckets come
from a counter hash of (seed, coordinate), never from a stateful generator.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

BLOCK = 4096
"""Coordinates per block of the dense projection's sign matrix."""


class Projection(Protocol):
    """Maps rows of length D to rows of length `dim`."""

    dim: int

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """(n, D) -> (n, dim), float32."""
        ...


@dataclass
class Sparse:
    """One signed bucket per coordinate: the sparse Johnson-Lindenstrauss transform with s = 1.

    Source: Charikar, Chen, Farach-Colton 2002 (count sketch); Kane & Nelson 2014. Costs O(D) a
    row and keeps inner products as well as a dense sign matrix of the same width.
    """

    size: int
    dim: int
    seed: int

    def __post_init__(self) -> None:
        bits = splitmix64(np.arange(self.size, dtype=np.uint64), self.seed)
        self._bucket = torch.from_numpy(((bits >> np.uint64(1)) % np.uint64(self.dim)).astype(int))
        self._sign = torch.from_numpy((bits & np.uint64(1)).astype(np.float32)) * 2 - 1

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """(n, D) -> (n, dim)."""
        if self._bucket.device != rows.device:
            self._bucket, self._sign = self._bucket.to(rows.device), self._sign.to(rows.device)
        out = torch.zeros(self.dim, len(rows), device=rows.device)  # transposed: rows add whole
        out.index_add_(0, self._bucket, (rows.float() * self._sign).T.contiguous())
        return out.T.contiguous()


@dataclass
class Rademacher:
    """Dense matrix of signs over sqrt(dim), as LESS and TRAK project; the reference, and slow."""

    size: int
    dim: int
    seed: int

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """(n, D) -> (n, dim)."""
        out = torch.zeros(len(rows), self.dim, device=rows.device)
        columns = np.arange(self.dim, dtype=np.uint64)
        for start in range(0, self.size, BLOCK):
            stop = min(start + BLOCK, self.size)
            lines = np.arange(start, stop, dtype=np.uint64)[:, None] * np.uint64(self.dim)
            bits = splitmix64(lines + columns, self.seed) & np.uint64(1)  # (block, dim)
            signs = torch.from_numpy(bits.astype(np.float32)).to(rows.device) * 2 - 1
            out += rows[:, start:stop].float() @ signs
        return out / self.dim**0.5


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
