"""New tokens are written as sparse sums of shared tokens in the donor, read off in the base.

Paper: Goddard & Fernandes Neto 2025, "Training-Free Tokenizer Transplantation via Orthogonal
Matching Pursuit" (arXiv 2506.06607); orthogonal matching pursuit in Gram form from Rubinstein et
al. 2008 (Batch-OMP).

y ~ sum_j c_j a_j with k of the donor's shared rows a_j, picked one by one by the largest |<r, a>|
of the residual r, coefficients by least squares after every pick; e_new = sum_j c_j b_j with the
base's rows b_j of the same tokens.

Differs: rows are compared at unit length (`normalise`), since long rows win every pick otherwise; a
pick that depends on earlier ones, or a residual of nothing, ends a token's sum early.

Not covered: rotary variants, dictionaries chosen by language.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, final

from pydantic import Field

from deltaloom.core.method import Sizes, Work
from deltaloom.transfer._donor import DonorTransferrer

if TYPE_CHECKING:
    from torch import Tensor

    from deltaloom.core.run import Run

BLOCK = 2048
"""New tokens whose rows are kept together in the scratch (ours)."""


@final
class Omp(DonorTransferrer):
    """Sparse sums of shared tokens."""

    k: Annotated[int, Field(ge=1)] | None = None
    """Shared tokens in a sum at most. None is an eighth of the donor's width and 64 at most (ours;
    the paper and mergekit: 64, for widths of thousands): as many as the donor is wide write any
    row, noise and all, and with 64 for a width of 64 rows were worse than random ones
    (bench/claims/transfer.py)."""
    normalise: bool = True
    """Pick by the angle to a row, not by its length as well (ours; mergekit does not, and with one
    row in thirty five times as long, all its picks were those)."""

    def work(self, sizes: Sizes) -> Work:
        """As the others, and the largest Gram matrix of shared tokens."""
        work = super().work(sizes)
        return replace(work, memory_bytes=work.memory_bytes + 2.0**31)

    def mapped(
        self, wanted: Tensor, theirs: Tensor, ours: Tensor, pieces: Tensor, run: Run, label: str
    ) -> Tensor:
        """Rows by pursuit, block by block; finished blocks survive an interruption."""
        import torch
        from safetensors.torch import load_file, save_file

        from deltaloom.core.atomic import new_file
        from deltaloom.core.progress import progress
        from deltaloom.transfer._pursuit import Pursuit

        most = self.k or max(1, min(64, theirs.shape[1] // 8))
        pursuit = Pursuit(theirs, min(most, len(theirs)), normalise=self.normalise)
        blocks = []
        with progress(f"pursuit, {label} rows", len(wanted)) as advance:
            for start in range(0, len(wanted), BLOCK):
                path = run.work / f"omp-{label}-{start}.safetensors"
                part = wanted[start : start + BLOCK]
                if not path.exists():
                    places, factors = pursuit.sums(part)
                    with new_file(path) as temporary:
                        save_file({"rows": weighted(ours, places, factors)}, temporary)
                blocks.append(load_file(path)["rows"])
                advance(len(part))
        return torch.cat(blocks)


def weighted(rows: Tensor, places: Tensor, factors: Tensor) -> Tensor:
    """Sums over j of factors (n, k) times rows (m, d) at places (n, k), float32, (n, d)."""
    import torch

    return torch.nn.functional.embedding_bag(
        places, rows, per_sample_weights=factors.to(rows.dtype), mode="sum"
    )
