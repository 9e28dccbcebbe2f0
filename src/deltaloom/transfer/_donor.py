"""What methods have in common that look at the rows of a model with the new tokenizer."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

from deltaloom.transfer._embeddings import EmbeddingTransferrer

if TYPE_CHECKING:
    from torch import Tensor

    from deltaloom.core.examples import Examples
    from deltaloom.core.run import Run
    from deltaloom.transfer._move import Move


class DonorTransferrer(EmbeddingTransferrer):
    """Abstract: rows made from the donor's; tokens that the donor lacks get their pieces' mean."""

    uses = frozenset({"data", "donor"})

    @abstractmethod
    def mapped(
        self, wanted: Tensor, theirs: Tensor, ours: Tensor, pieces: Tensor, run: Run, label: str
    ) -> Tensor:
        """Rows for the base, (n, d).

        Args:
            wanted: The donor's rows of the new tokens, (n, e).
            theirs: The donor's rows of the tokens that both have, (m, e).
            ours: The base's rows of those, (m, d).
            pieces: Mean rows of the new tokens' pieces in the base, (n, d).
            run: For scratch that survives interruption.
            label: Which table it is.
        """

    def rows(self, move: Move, table: Tensor, run: Run, data: Examples | None) -> Tensor:
        """Rows from the donor's."""
        import torch

        from deltaloom.transfer._move import means

        made = means(table, move.pieces)
        places, numbers = (torch.tensor(one, dtype=torch.long) for one in move.given)
        ours, theirs = (torch.tensor(one, dtype=torch.long) for one in move.anchors)
        assert move.donor is not None
        if not move.output:
            run.note(anchors=len(ours), new_tokens_without_donor=len(move.new) - len(places))
        if len(places):
            donor = move.donor.table(move.output)
            label = "output" if move.output else "input"
            made[places] = self.mapped(
                donor[numbers], donor[theirs], table[ours], made[places], run, label
            )
        return made
