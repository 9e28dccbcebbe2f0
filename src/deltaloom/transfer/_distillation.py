"""Distilling a model into itself under another tokenizer: likelihoods of equal stretches of bytes.

Paper: Minixhofer et al. 2025, "Cross-Tokenizer Distillation via Approximate Likelihood Matching"
(ALM, arXiv 2503.20083).

Both tokenizers cut a row's bytes; where both have a border, a chunk ends. With l_t and l_s the
teacher's and the student's log-probability of a chunk (sums over its tokens) and p = exp(l / T),
loss = -(p_t log p_s + (1 - p_t) log(1 - p_s)), added to the text's own cross-entropy.

Differs: times T, which gives the gradient the size of the likelihood's own; summed over chunks and
divided by tokens, as the cross-entropy is. Rows whose bytes do not agree (unknown characters, a
tokenizer that rewrites its text) have no such term; their number is in the run's notes.

Not covered: bias corrections at chunk borders (the next token's space), hidden states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from deltaloom.core.encoding import Encoded, encode
from deltaloom.core.vocabulary import Vocabulary
from deltaloom.engine.objective import Objective

if TYPE_CHECKING:
    from deltaloom.core.base import Base
    from deltaloom.core.examples import Examples
    from deltaloom.core.run import Run

TEMPERATURE = 100.0
"""T (tokenkit's default)."""
CLOSE = 1e-6
"""Least distance of a chunk's probability from 1."""


@dataclass(frozen=True)
class Chunks:
    """A row's chunks in the student's tokens."""

    ends: tuple[int, ...]
    """Number of the student's token that ends each chunk."""
    start: int
    """Number of the student's token after which the first chunk begins."""
    teacher: tuple[float, ...]
    """The teacher's log-probability of each."""


class Distillation(Objective):
    """Adds the chunks' loss."""

    def __init__(self, chunks: Sequence[Chunks | None]) -> None:
        self.chunks = chunks

    @classmethod
    def prepare(
        cls, base: Base, moved: Base, data: Examples, rows: Sequence[Encoded], run: Run
    ) -> Distillation:
        """Align every row and score it by the teacher, which is `base`, once.

        `rows` are those of `data` for the student, `moved`.
        """
        from deltaloom.engine.forward import padding_token, token_logprobs
        from deltaloom.engine.meter import count_forward

        tokenizer = base.tokenizer()
        theirs = encode(data, tokenizer, base.max_length)
        teacher = base.load()
        found = token_logprobs(
            teacher,
            [(row.input_ids, [1] * len(row.input_ids)) for row in theirs],
            padding_token(tokenizer),
        )
        count_forward(run, teacher, sum(len(row.input_ids) for row in theirs))
        old, new = Vocabulary.read(base.folder), Vocabulary.read(moved.folder)
        chunks = [
            aligned(borders(own.input_ids, new), borders(row.input_ids, old), values.tolist())
            for own, row, values in zip(rows, theirs, found, strict=True)
        ]
        run.note(
            rows_not_aligned=sum(one is None for one in chunks),
            chunks=sum(len(one.ends) for one in chunks if one),
        )
        return cls(chunks)

    def begin_training(self, rows: Sequence[Encoded], pad_id: int) -> None:
        """Keep the rows' tokens, whose likelihoods count in the prompt as well."""
        self.ids = [row.input_ids for row in rows]

    def added_loss(
        self, logits: torch.Tensor, labels: torch.Tensor, rows: torch.Tensor, items: Any
    ) -> torch.Tensor | None:
        """The chunks' loss over the batch, divided by its tokens; logits (b, T, v)."""
        terms = []
        for place, number in enumerate(rows.tolist()):
            chunks = self.chunks[number]
            if chunks is None:
                continue
            stop = chunks.ends[-1] + 1
            scores = logits[place, : stop - 1].float()
            ids = torch.tensor(self.ids[number][1:stop], device=scores.device)
            own = scores.gather(1, ids[:, None])[:, 0] - scores.logsumexp(1)
            sums = torch.cumsum(own, 0)  # [j]: of tokens 1 to j + 1
            ends = torch.tensor(chunks.ends, device=sums.device) - 1
            before = torch.cat([ends.new_tensor([chunks.start - 1]), ends[:-1]])
            first = torch.where(before >= 0, sums[before.clamp(min=0)], 0.0)
            wanted = torch.tensor(chunks.teacher, device=sums.device)
            terms.append(chunk_loss(wanted, sums[ends] - first).sum())
        if not terms:
            return None
        total = torch.stack(terms).sum()
        return total / (labels.ne(-100).sum() if items is None else items)


def chunk_loss(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """The binary cross-entropy of log-probabilities (c,), times the temperature."""
    wanted = torch.exp(teacher / TEMPERATURE)
    ratio = (student / TEMPERATURE).clamp(max=-CLOSE)
    rest = torch.log(-torch.expm1(ratio))
    return -TEMPERATURE * (wanted * ratio + (1 - wanted) * rest)


def borders(ids: Sequence[int], vocabulary: Vocabulary) -> tuple[bytes, list[int]]:
    """The bytes of a row's tokens, and how many there are behind each token."""
    text, ends = b"", []
    for number in ids:
        text += vocabulary.tokens[number] or b""
        ends.append(len(text))
    return text, ends


def aligned(
    student: tuple[bytes, list[int]], teacher: tuple[bytes, list[int]], scores: Sequence[float]
) -> Chunks | None:
    """Chunks of a row whose tokens end as `borders` tells; None where the bytes do not agree.

    `scores` are the teacher's log-probabilities of its tokens after the first. A space that only
    one tokenizer puts before a text does not count; a row that one side cut short ends there.
    """
    (ours, our_ends), (theirs, their_ends) = student, teacher
    shift = len(ours) - len(ours.lstrip(b" ")), len(theirs) - len(theirs.lstrip(b" "))
    ours, theirs = ours[shift[0] :], theirs[shift[1] :]
    length = min(len(ours), len(theirs))
    if ours[:length] != theirs[:length]:
        return None
    own = _first_at([max(end - shift[0], 0) for end in our_ends], length)
    other = _first_at([max(end - shift[1], 0) for end in their_ends], length)
    # the first token of a row is never predicted: chunks begin where both sides have one
    shared = sorted(own.keys() & other.keys())
    if len(shared) < 2:
        return None
    sums = [0.0]
    for value in scores:
        sums.append(sums[-1] + value)
    ends, totals = [], []
    for before, end in pairwise(shared):
        ends.append(own[end])
        totals.append(sums[other[end]] - sums[other[before]])
    return Chunks(tuple(ends), own[shared[0]], tuple(totals))


def _first_at(ends: Sequence[int], length: int) -> dict[int, int]:
    """Border -> the first token that ends there, up to a length; special tokens have no bytes."""
    found: dict[int, int] = {}
    for number, end in enumerate(ends):
        if end <= length:
            found.setdefault(end, number)
    return found
