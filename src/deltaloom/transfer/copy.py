"""Keep the rows of shared tokens; new tokens get random, mean or zero rows: the baseline.

Paper: none of its own; the fallback of Ostendorff & Rehm 2023 (CLP-Transfer, arXiv 2301.09626) and
Minixhofer et al. 2022 (WECHSEL, arXiv 2112.06598).

e_new ~ N(m, diag(s^2)) with m and s the mean and standard deviation of the base's rows.

Differs: tokens are shared when their bytes are equal, where the papers compare texts as they are
written; special tokens are copied by their role.

Not covered: draws with the full covariance.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, final

from deltaloom.core.errors import InputError
from deltaloom.transfer._embeddings import EmbeddingTransferrer

if TYPE_CHECKING:
    from torch import Tensor

    from deltaloom.core.examples import Examples
    from deltaloom.core.run import Run
    from deltaloom.transfer._move import Move


@final
class Copy(EmbeddingTransferrer):
    """Shared rows copied, nothing known of the others."""

    rest: Literal["random", "mean", "zero"] = "random"
    """Rows of new tokens (random: the papers' fallback)."""

    def rows(self, move: Move, table: Tensor, run: Run, data: Examples | None) -> Tensor:
        """See `rest`."""
        import torch

        if not any(move.target.tokens[number] is not None for number in move.shared):
            raise InputError(
                f"transfer copy: {move.source.base.model} has none of the new tokenizer's tokens, "
                "so there is nothing to copy; use transfer fvt"
            )
        if self.rest == "zero":
            return torch.zeros(len(move.new), table.shape[1])
        if self.rest == "mean":
            return table.mean(0).repeat(len(move.new), 1)
        return drawn(table, len(move.new), run.seed + move.output)


def drawn(table: Tensor, count: int, seed: int) -> Tensor:
    """Rows with a table's mean and standard deviation per dimension, (count, d)."""
    import torch

    dice = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, table.shape[1], generator=dice)
    return table.mean(0) + noise * table.std(0)
