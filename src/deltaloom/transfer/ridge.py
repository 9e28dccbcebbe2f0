"""New tokens get the donor's rows through one linear map, fitted in closed form on shared tokens.

Paper: none that we know for tokenizers; linear maps between embedding spaces are Mikolov et al.
2013 (arXiv 1309.4168), here with a ridge.

W = argmin |(A - a) W - (B - b)|^2 + l |W|^2, e_new = (y - a) W + b; A and B are the donor's and the
base's rows of the tokens that both have, a and b their means, y the donor's row of the new token.

Differs: the ridge is relative to the mean square of the donor's centred rows in a direction; the
normal equations are summed and solved in float64.

Not covered: orthogonal maps (Procrustes), which need equal widths.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, final

from pydantic import Field

from deltaloom.transfer._donor import DonorTransferrer

if TYPE_CHECKING:
    from torch import Tensor

    from deltaloom.core.run import Run

BLOCK = 4096
"""Rows turned to float64 at once."""


@final
class Ridge(DonorTransferrer):
    """A linear map from the donor's embeddings to the base's."""

    ridge: Annotated[float, Field(gt=0)] = 0.1
    """The ridge l, times the mean of the diagonal of A'A (ours: 0.1 was best of 0.01, 0.1 and 1 in
    a pilot on two small models)."""

    def mapped(
        self, wanted: Tensor, theirs: Tensor, ours: Tensor, pieces: Tensor, run: Run, label: str
    ) -> Tensor:
        """Rows through the map."""
        return linear_map(wanted, theirs, ours, self.ridge)


def linear_map(wanted: Tensor, theirs: Tensor, ours: Tensor, ridge: float) -> Tensor:
    """Rows (n, d) of `wanted` (n, e) by the map that takes `theirs` (m, e) to `ours` (m, d)."""
    import torch

    a, b = theirs.double().mean(0), ours.double().mean(0)
    gram = torch.zeros(theirs.shape[1], theirs.shape[1], dtype=torch.float64)
    cross = torch.zeros(theirs.shape[1], ours.shape[1], dtype=torch.float64)
    for start in range(0, len(theirs), BLOCK):
        part = theirs[start : start + BLOCK].double() - a
        gram += part.T @ part
        cross += part.T @ (ours[start : start + BLOCK].double() - b)
    scale = gram.diagonal().mean()
    if scale == 0:  # one shared token, or all alike: nothing but the mean is known
        return b.float().repeat(len(wanted), 1)
    gram.diagonal().add_(ridge * scale)
    found = torch.cholesky_solve(cross, torch.linalg.cholesky(gram))
    return torch.cat(
        [
            ((wanted[start : start + BLOCK].double() - a) @ found + b).float()
            for start in range(0, len(wanted), BLOCK)
        ]
    )
