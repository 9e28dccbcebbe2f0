"""New tokens get sparse mixtures of the shared tokens that are used alike in a text.

Paper: Dobler & de Melo 2023, "FOCUS: Effective Embedding Initialization for Monolingual
Specialization of Multilingual Models" (EMNLP, arXiv 2305.14481).

e_new = sum_j w_j e_j, w = sparsemax(cos(x_new, x_j)) over the shared tokens j; x are static vectors
of tokens, learned from text as the new tokenizer cuts it. Tokens without such a vector get rows
drawn with the mean and standard deviation of the base's.

Differs: the vectors are factors of the tokens' mutual information in `data`, where the paper trains
fastText; no package is needed for that, and no passes.

Not covered: pretrained word vectors as x; the paper's fuzzy matching of shared tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, final

from pydantic import Field

from deltaloom.core.errors import InputError
from deltaloom.core.vocabulary import load_tokenizer
from deltaloom.transfer._embeddings import TOKENIZER, EmbeddingTransferrer

if TYPE_CHECKING:
    from torch import Tensor

    from deltaloom.core.examples import Example, Examples
    from deltaloom.core.run import Run
    from deltaloom.transfer._move import Move

Count = Annotated[int, Field(ge=1)]
FIRST = 512
"""Largest cosines among which a mixture is looked for first (ours)."""
BLOCK = 256


@final
class Focus(EmbeddingTransferrer):
    """Mixtures by static vectors of the new tokenizer's tokens."""

    needs = frozenset({"data"})

    width: Count = 100
    """Dimensions of the static vectors (the authors' code: 100)."""
    window: Count = 5
    """Tokens to either side that count as context (fastText's default)."""
    least: Count = 10
    """Times that a token must be seen in the text to have a vector (the authors' code: 10)."""

    def rows(self, move: Move, table: Tensor, run: Run, data: Examples | None) -> Tensor:
        """Mixtures, and drawn rows for tokens that the text has too seldom."""
        import torch

        from deltaloom.transfer._static_vectors import static_vectors
        from deltaloom.transfer.copy import drawn

        assert data is not None
        tokenizer = load_tokenizer(run.work / TOKENIZER)
        texts = [tokenizer(text_of(row), add_special_tokens=False)["input_ids"] for row in data]
        found = static_vectors(
            texts, len(move.target), window=self.window, least=self.least, width=self.width
        )
        vectors = torch.from_numpy(found)
        has = vectors.square().sum(1) > 0
        known = [one for one in move.shared if has[one] and move.target.tokens[one] is not None]
        if not known:
            raise InputError(
                f"transfer focus: of the tokens that both tokenizers have, {data.name} has none "
                f"least = {self.least} times; give more text or a smaller least="
            )
        rows = table[torch.tensor([move.shared[one] for one in known])]
        made = drawn(table, len(move.new), run.seed + move.output)
        places = [place for place, one in enumerate(move.new) if has[one]]
        theirs = vectors[torch.tensor(known)]
        for start in range(0, len(places), BLOCK):
            part = torch.tensor(places[start : start + BLOCK])
            wanted = vectors[torch.tensor([move.new[place] for place in part.tolist()])]
            made[part] = mixtures(wanted @ theirs.T, rows)
        if not move.output:
            run.note(new_tokens_without_vector=len(move.new) - len(places))
        return made


def mixtures(cosines: Tensor, rows: Tensor) -> Tensor:
    """Rows (n, d): sparsemax of cosines (n, m) times rows (m, d)."""
    import torch

    count = min(FIRST, cosines.shape[1])
    largest, places = cosines.topk(count, dim=1)
    weights = sparsemax(largest)
    if count < cosines.shape[1] and (weights[:, -1] > 0).any():  # the support may go on
        return sparsemax(cosines) @ rows
    return torch.nn.functional.embedding_bag(places, rows, per_sample_weights=weights, mode="sum")


def sparsemax(scores: Tensor) -> Tensor:
    """The point of the simplex that is nearest to each row (Martins & Astudillo 2016), (n, m)."""
    import torch

    ordered = scores.sort(dim=1, descending=True).values
    sums = ordered.cumsum(1)
    counts = torch.arange(1, scores.shape[1] + 1, dtype=scores.dtype)
    size = (1 + counts * ordered > sums).sum(1, keepdim=True)
    threshold = (sums.gather(1, size - 1) - 1) / size
    return (scores - threshold).clamp(min=0)


def text_of(row: Example) -> str:
    """All that a row says."""
    if row.text is not None:
        return row.text
    if row.messages is not None:
        return "\n".join(turn["content"] for turn in row.messages)
    return f"{row.prompt or ''}{row.response or ''}"
