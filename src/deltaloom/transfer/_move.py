"""A move to another tokenizer: which tokens both know, and where rows for the others may come from.

Tokens are compared as bytes, special ones by what they do (`core/vocabulary.py`). Numbers beyond a
table's rows, which some tokenizers have, count as unknown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from deltaloom.core.deltas.vocab import STAND_INS, is_tied, table_names
from deltaloom.core.errors import InputError
from deltaloom.core.tensors import TensorFolder
from deltaloom.core.vocabulary import Vocabulary

if TYPE_CHECKING:
    from torch import Tensor

    from deltaloom.core.base import Base

FIRST = {False: ("bos", "eos"), True: ("eos", "bos")}
"""Of a token with several roles, the one that counts: a text begins with one in the input, and
ends with one in the output."""


@dataclass(frozen=True)
class Side:
    """A model's tokens and tables."""

    base: Base
    vocabulary: Vocabulary
    names: tuple[str, ...]
    """Stored tables, the input's first."""
    tied: bool
    rows: int
    width: int

    @classmethod
    def read(cls, base: Base) -> Side:
        """From a model folder; raises InputError where its tables are not understood."""
        names = table_names(base)
        with TensorFolder(base.folder) as own:
            shape = own[names[0]].shape
        vocabulary = Vocabulary.read(base.folder)
        tied = len(names) == 1 or is_tied(base)
        return cls(base, vocabulary, names, tied, shape[0], shape[1])

    def table(self, output: bool) -> Tensor:
        """The input or the output table, float32, (rows, d)."""
        with TensorFolder(self.base.folder) as own:
            return own.read(self.names[-1 if output and not self.tied else 0]).float()

    def knows(self, number: int | None) -> bool:
        """Whether there is a row for this token."""
        return number is not None and number < self.rows


@dataclass(frozen=True)
class Move:
    """What is known when the rows of one table are made."""

    source: Side
    target: Vocabulary
    output: bool
    """Whether the table is the output's, untied from the input's."""
    donor: Side | None = None
    keeps_shared: bool = True
    """Whether tokens that both have keep the source's rows; they are made like new ones if not."""

    @cached_property
    def shared(self) -> dict[int, int]:
        """Target's token -> the source's that is the same or does its work."""
        found = {}
        for number in range(len(self.target)):
            same = counterpart(self.target, number, self.source.vocabulary, self.output)
            if self.source.knows(same):
                found[number] = same
        return found  # pyright: ignore[reportReturnType]

    @cached_property
    def new(self) -> list[int]:
        """Target's tokens with bytes whose rows are to be made, by number: those that the source
        does not have, or all.
        """
        return [
            number
            for number, token in enumerate(self.target.tokens)
            if token is not None and not (self.keeps_shared and number in self.shared)
        ]

    @cached_property
    def pieces(self) -> list[list[int]]:
        """For each of those, the source's tokens for its bytes; empty where it knows none."""
        source = self.source
        return [
            [
                one
                for one in source.vocabulary.pieces(self.target.tokens[number] or b"")
                if source.knows(one)
            ]
            for number in self.new
        ]

    @cached_property
    def given(self) -> tuple[list[int], list[int]]:
        """Places in `new` of the tokens that the donor has, and the donor's numbers of them."""
        assert self.donor is not None
        places, numbers = [], []
        for place, number in enumerate(self.new):
            same = counterpart(self.target, number, self.donor.vocabulary, self.output)
            if self.donor.knows(same):
                places.append(place)
                numbers.append(same)
        return places, numbers  # pyright: ignore[reportReturnType]

    @cached_property
    def anchors(self) -> tuple[list[int], list[int]]:
        """Tokens with bytes that source and donor both have: the source's numbers, the donor's."""
        assert self.donor is not None
        ours, theirs = [], []
        for token, number in self.source.vocabulary.numbers.items():
            same = self.donor.vocabulary.numbers.get(token)
            if self.source.knows(number) and self.donor.knows(same):
                ours.append(number)
                theirs.append(same)
        if not ours:
            raise InputError(
                f"{self.source.base.model} and {self.donor.base.model} share no token, so nothing "
                "maps the embeddings of one to the other's; use transfer fvt, or another donor"
            )
        return ours, theirs  # pyright: ignore[reportReturnType]


def counterpart(ours: Vocabulary, number: int, theirs: Vocabulary, output: bool) -> int | None:
    """The token of another vocabulary that is this one or does its work."""
    token = ours.tokens[number]
    if token is not None:
        return theirs.find(token, fallback=number in ours.fallback)
    if number not in ours.special:
        return None
    roles = [role for role, one in ours.roles.items() if one == number]
    roles.sort(key=lambda role: FIRST[output].index(role) if role in FIRST[output] else 2)
    for role in roles:
        for other in STAND_INS[role]:
            if other in theirs.roles:
                return theirs.roles[other]
    return theirs.named(ours.special[number])


def means(table: Tensor, groups: Sequence[Sequence[int]]) -> Tensor:
    """The mean of some rows of a table for each group, the table's mean for empty ones, (n, d)."""
    flat = torch.tensor([one for group in groups for one in group], dtype=torch.long)
    sizes = torch.tensor([len(group) for group in groups], dtype=torch.long)
    offsets = torch.cumsum(sizes, 0) - sizes
    found = torch.nn.functional.embedding_bag(flat, table, offsets, mode="mean")
    found[sizes == 0] = table.mean(0)
    return found
