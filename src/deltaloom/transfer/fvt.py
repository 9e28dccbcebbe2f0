"""New tokens get the mean of the rows of the pieces that the base's tokenizer cuts them into.

Paper: Gee et al. 2022, "Fast Vocabulary Transfer for Language Model Compression" (EMNLP Industry,
arXiv 2402.09977).

e_new = (1 / m) sum_j e(piece_j), the pieces being the base's own tokens for the new token's bytes.

Differs: pieces come from bytes, through the tokenizer's model alone (no pre-tokenizer puts a space
before them), and half a character is cut by byte fallbacks; a token of which no piece is known gets
the mean row, where the paper cannot meet one.

Not covered: the paper's further masked-language-model training; weighted or positional means.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from deltaloom.transfer._embeddings import EmbeddingTransferrer

if TYPE_CHECKING:
    from torch import Tensor

    from deltaloom.core.examples import Examples
    from deltaloom.core.run import Run
    from deltaloom.transfer._move import Move


@final
class Fvt(EmbeddingTransferrer):
    """The mean of a token's pieces."""

    def rows(self, move: Move, table: Tensor, run: Run, data: Examples | None) -> Tensor:
        """Means over pieces."""
        from deltaloom.transfer._move import means

        if not move.output:
            run.note(new_tokens_without_pieces=sum(not one for one in move.pieces))
        return means(table, move.pieces)
