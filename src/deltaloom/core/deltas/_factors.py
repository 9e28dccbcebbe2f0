"""One module's low-rank change: its two factors, and what sums, products and truncation do to them.

LoRA (Hu et al. 2021, section 4.1) changes a weight by `scale * B @ A`. DoRA (Liu et al. 2024,
section 4.1) makes it `m * (W + scale B A) / |W + scale B A|`, row by row. With t = m / |W + scale B
A| that is the change `(t - 1) * W + t * scale * B A`: multiples of the base's own rows plus a
low-rank term. Such changes are closed under sums and multiples, and each of them is again a DoRA
change of some m, so sums of DoRA adapters are DoRA adapters, exactly.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from deltaloom.core.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

NOTHING = 1e-6
"""Part of a base's row below which DoRA's form cannot leave it out; of the order of float32."""


@dataclass(frozen=True)
class Factors:
    """One module's change `scale * B @ A`, transposed when the base stores its weight so."""

    a: Tensor
    """(r, in)"""
    b: Tensor
    """(out, r)"""
    scale: float
    transposed: bool = False
    table: bool = False
    """Whether the module is an embedding, whose factors PEFT names differently."""
    rows: Tensor | None = None
    """(out,) multiples of the base's own rows that are added as well."""
    magnitude: Tensor | None = None
    """(out,) DoRA's m as it was trained, as long as nobody asked for `settled` factors."""

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the base's weight."""
        out, into = self.b.shape[0], self.a.shape[1]
        return (into, out) if self.transposed else (out, into)

    @property
    def plain(self) -> bool:
        """Whether the change is the product of the factors and nothing else."""
        return self.rows is None and self.magnitude is None

    @property
    def nothing(self) -> bool:
        """Whether the change is known to be zero without a look at the factors."""
        return self.scale == 0.0 and (self.rows is None or not self.rows.any())

    def product(self) -> Tensor:
        """`scale * B @ A`, (out, in), float32."""
        return (self.b.float() @ self.a.float()) * self.scale

    def dense(self, weight: Tensor | None = None) -> Tensor:
        """The change in the base's layout, float32; `weight` is the base's, for settled rows."""
        change = self.product()
        if self.rows is not None:
            assert weight is not None
            change = change + self.rows[:, None] * self._straight(weight)
        return change.T if self.transposed else change

    def settled(self, weight: Tensor) -> Factors:
        """The same change with DoRA's magnitudes turned into multiples of the base's rows."""
        if self.magnitude is None:
            return self
        lengths = (self._straight(weight) + self.product()).double().norm(dim=1)
        # A row without length has no direction; PEFT divides by zero there.
        times = (self.magnitude.double() / lengths.clamp_min(1e-30)).float()  # (out,)
        b = self.b.float() * times[:, None]
        return replace(self, b=b, rows=(times.double() - 1).float(), magnitude=None)

    def with_magnitude(self, weight: Tensor) -> Factors:
        """The same change as DoRA stores it, scale one; the inverse of `settled`."""
        import torch

        rows = torch.zeros(self.b.shape[0]) if self.rows is None else self.rows
        times = 1 + rows  # (out,)
        least = torch.where(times < 0, -NOTHING, NOTHING)
        times = torch.where(times.abs() < NOTHING, least, times)
        b = self.b.float() * self.scale / times[:, None]
        own = replace(self, b=b, scale=1.0, rows=None)
        lengths = (self._straight(weight) + own.product()).double().norm(dim=1)
        return replace(own, magnitude=(times * lengths).float())

    def times(self, factor: float) -> Factors:
        """`factor` times this change; the factors must be settled."""
        rows = None if self.rows is None else self.rows * factor
        return replace(self, scale=self.scale * factor, rows=rows)

    def joined(self, other: Factors) -> Factors:
        """Both changes as one of rank r1 + r2, exactly; both must be settled."""
        import torch

        if self.nothing or other.nothing:
            return self if other.nothing else other
        if other.transposed != self.transposed:
            if self.rows is None:
                return other.joined(self) if other.rows is not None else self.joined(other.turned())
            other = other.turned()
        mine, theirs = self.b.float() * self.scale, other.b.float() * other.scale
        a = torch.cat([self.a.float(), other.a.float()])  # (r1 + r2, in)
        b = torch.cat([mine, theirs], dim=1)  # (out, r1 + r2)
        rows = [own.rows for own in (self, other) if own.rows is not None]
        total = sum(rows[1:], start=rows[0]) if rows else None
        return Factors(a, b, 1.0, self.transposed, self.table or other.table, total)

    def turned(self) -> Factors:
        """The same change with the layout told the other way round."""
        if not self.plain:
            raise InputError("two adapters disagree on which side of a module is its output")
        return replace(self, a=self.b.T, b=self.a.T, transposed=not self.transposed)

    def dot(self, other: Factors) -> float:
        """Inner product of plain changes through r1 x r2 matrices: tr((B1'B2)(A2 A1'))."""
        if other.transposed != self.transposed:
            other = other.turned()
        bb = self.b.double().T @ other.b.double()  # (r1, r2)
        aa = self.a.double() @ other.a.double().T  # (r1, r2)
        return float((bb * aa).sum()) * self.scale * other.scale

    def truncated(self, rank: int) -> tuple[Factors, float]:
        """The nearest change whose factors have at most `rank`, and the part of the energy kept.

        Energy is the squared Frobenius norm of the factors' product; multiples of the base's rows
        stay as they are. QR of each factor and an SVD of the small core between them: the cost is
        O((out + in) r^2), and the dense matrix is never made.
        """
        import torch

        left, upper = torch.linalg.qr(self.b.float() * self.scale)  # (out, k), (k, r)
        right, lower = torch.linalg.qr(self.a.float().T)  # (in, l), (l, r)
        u, s, v = torch.linalg.svd(upper.double() @ lower.double().T, full_matrices=False)
        total, keep = float((s**2).sum()), min(rank, len(s))
        root = s[:keep].sqrt()  # split evenly, so that neither factor is large
        b = left @ (u[:, :keep] * root).float()  # (out, keep)
        a = (root[:, None] * v[:keep]).float() @ right.T  # (keep, in)
        part = float((s[:keep] ** 2).sum()) / total if total else 1.0
        return replace(self, a=a, b=b, scale=1.0), part

    def _straight(self, weight: Tensor) -> Tensor:
        return weight.float().T if self.transposed else weight.float()
