"""Sampled tokenizers: unigram models over the substrings of some text, with noise on their scores.

Paper: Minixhofer et al. 2024, "Zero-Shot Tokenizer Transfer" (arXiv 2405.07883, section 3.1);
lengths and strides are those of the authors' code.

score(s) = bytes(s) count(s), p = score / sum of scores + N(0, sd^2), ln sd ~ N(ln noise, spread^2);
the pieces with the largest p are kept, beside every single byte, and text is cut where the sum of
log p is largest. A step's tokenizer is made of the texts of the last few batches, its own included,
so a step depends on the seed and its number alone, and training resumes anywhere.

Differs: no pieces are added for runs of spaces.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from deltaloom.core.vocabulary import ALPHABET, CODES

LONGEST = 15
"""Bytes of a piece at most (the authors' code)."""
STRIDE = 4
"""Characters of a word between the starts of its substrings (the authors' code)."""
NEVER = -100_000.0
"""Score of a piece whose noised probability is not positive (the authors' code)."""
WIDEST = 16
"""Characters of a text that are read for one of its tokens (the authors' code)."""


@dataclass(frozen=True)
class Sampled:
    """A tokenizer: pieces in the printable alphabet of bytes, with their scores."""

    pieces: tuple[str, ...]
    scores: tuple[float, ...]
    leading_space: bool
    """Whether texts get a space before their first word."""

    @property
    def tokens(self) -> list[bytes]:
        """What each piece stands for."""
        return [bytes(CODES[sign] for sign in piece) for piece in self.pieces]

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Numbers of the pieces of each text."""
        return [one.ids for one in self._inner.encode_batch(list(texts))]

    @cached_property
    def _inner(self) -> Any:
        from tokenizers import Tokenizer, models

        inner = Tokenizer(models.Unigram(list(zip(self.pieces, self.scores, strict=True))))
        inner.pre_tokenizer = splitter(self.leading_space)
        return inner


@dataclass(frozen=True)
class TokenizerSampler:
    """Batches of text and a tokenizer for each, by the number of a step."""

    texts: Sequence[str]
    seed: int
    batch: int
    """Texts in a step's batch."""
    window: int
    """Batches that a tokenizer is made of."""
    size: int
    """Pieces of a tokenizer, at most."""
    length: int
    """Tokens of a text that are wanted; of longer texts a random part is read."""
    noise: float
    spread: float
    leading_space: bool

    def draw(self, step: int) -> tuple[list[tuple[str, bool]], Sampled]:
        """A step's texts, each with whether it goes on to its end, and its tokenizer."""
        scores: Counter[str] = Counter()
        for number in range(step, step + self.window):
            scores.update(self._counts(number))
        dice = np.random.default_rng([self.seed, step, 1])
        return self._batch(step + self.window - 1), self.sampled(scores, dice)

    def sampled(self, words: Counter[str], dice: np.random.Generator) -> Sampled:
        """The tokenizer of some words with their counts."""
        found: Counter[str] = Counter()
        for word, count in words.items():
            for piece in substrings(word):
                found[piece] += count * len(piece)
        pieces = sorted(found)
        raw = np.array([found[piece] for piece in pieces], dtype=np.float64)
        deviation = self.noise * math.exp(self.spread * dice.standard_normal())
        share = raw / raw.sum() + deviation * dice.standard_normal(len(raw))
        logs = np.full(len(share), NEVER)
        np.log(share, out=logs, where=share > 0)
        least = math.log(raw.min() / raw.sum())
        best = [number for number in np.argsort(-logs, kind="stable") if len(pieces[number]) > 1]
        best = best[: max(self.size - len(ALPHABET), 0)]
        return Sampled(
            (*ALPHABET, *(pieces[number] for number in best)),
            (*[least] * len(ALPHABET), *(float(logs[number]) for number in best)),
            self.leading_space,
        )

    def _batch(self, number: int) -> list[tuple[str, bool]]:
        dice = np.random.default_rng([self.seed, number, 0])
        chosen = dice.integers(len(self.texts), size=self.batch)
        starts = dice.random(self.batch)
        longest = WIDEST * self.length
        found = []
        for one, share in zip(chosen.tolist(), starts.tolist(), strict=True):
            text = self.texts[one]
            start = int(share * (max(len(text) - longest, 0) + 1))
            found.append((text[start : start + longest], start + longest >= len(text)))
        return found

    def _counts(self, number: int) -> Counter[str]:
        kept = self._kept
        if number not in kept:
            split = splitter(self.leading_space)
            kept[number] = Counter(
                word for text, _ in self._batch(number) for word, _ in split.pre_tokenize_str(text)
            )
            if len(kept) > self.window:
                kept.popitem(last=False)
        return kept[number]

    @cached_property
    def _kept(self) -> OrderedDict[int, Counter[str]]:
        return OrderedDict()


def splitter(leading_space: bool) -> Any:
    """What cuts a text into words in the printable alphabet of bytes, as GPT-2 does."""
    from tokenizers import pre_tokenizers

    return pre_tokenizers.ByteLevel(add_prefix_space=leading_space)


@lru_cache(maxsize=2**18)
def substrings(word: str) -> tuple[str, ...]:
    """Substrings that count, a word in the printable alphabet of bytes."""
    starts = [place for place, sign in enumerate(word) if not 128 <= CODES[sign] < 192][::STRIDE]
    return tuple(
        word[start : start + length]
        for start in starts
        for length in range(1, min(LONGEST, len(word) - start) + 1)
    )
