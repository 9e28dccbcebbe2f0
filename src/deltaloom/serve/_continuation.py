"""One continuation on its way: what is asked, how far it is, whom it tells."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from deltaloom.serve._cache import Prefix
from deltaloom.serve._sampling import Sampling
from deltaloom.serve._text import GrowingText

Finish = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True, slots=True)
class Piece:
    """News of one continuation."""

    text: str
    """What is new; all of it, at the end, where nothing is streamed."""
    finish: Finish | None = None
    error: str | None = None


@dataclass(eq=False)
class Continuation:
    """A prompt and what comes after it."""

    task: str
    """Name of the task that answers."""
    adapter: str | None
    """Its name in the stack of low-rank changes; None when it has none there."""
    prompt: Sequence[int]
    max_tokens: int
    sampling: Sampling
    tell: Callable[[Piece], None]
    """Called on the worker's thread."""
    stop: tuple[str, ...] = ()
    seed: int | None = None
    stream: bool = False
    prefix: Prefix = ()
    """Keys and values of its task's virtual tokens, which take the places before the prompt."""

    tokens: list[int] = field(default_factory=list)
    """Generated so far."""
    read: int = 0
    """Prompt tokens read."""
    cancelled: bool = False
    finished: bool = False
    arrived: float = field(default_factory=time.monotonic)
    first_at: float | None = None
    """When its first token was there."""

    def __post_init__(self) -> None:
        # Making one takes as long as a token of a small model.
        self._draws = random.Random(self.seed) if self.sampling.temperature > 0 else None
        self._text: GrowingText | None = None

    @property
    def before(self) -> int:
        """Places before the prompt."""
        return len(self.prefix[0][0]) if self.prefix else 0

    @property
    def length(self) -> int:
        """Places it holds in the cache."""
        return self.before + self.read + max(len(self.tokens) - 1, 0)

    @property
    def most(self) -> int:
        """Places it may come to need."""
        return self.before + len(self.prompt) + self.max_tokens

    def draw(self) -> float:
        """The next number in [0, 1), for a token that is drawn."""
        return 0.0 if self._draws is None else self._draws.random()

    def begin(self, tokenizer: Any) -> None:
        """Be admitted: its text is decoded by this tokenizer."""
        self._text = GrowingText(tokenizer, self.stop)

    def take(self, token: int, ends: frozenset[int]) -> None:
        """One more token; tells what is new, and the end when this is it."""
        assert self._text is not None
        if self.first_at is None:
            self.first_at = time.monotonic()
        self.tokens.append(token)
        if token in ends:
            self._end("stop", self.tokens[:-1])
        elif (self.stream or self.stop) and self._text.add(token):
            self._end("stop", self.tokens)
        elif len(self.tokens) >= self.max_tokens:
            self._end("length", self.tokens)
        elif self.stream and (piece := self._text.piece()):
            self.tell(Piece(piece))

    def drop(self, finish: Finish, error: str | None = None) -> None:
        """End it before its time."""
        if not self.finished:
            self.finished = True
            self.tell(Piece("", finish, error))

    def _end(self, finish: Finish, ids: list[int]) -> None:
        assert self._text is not None
        self.finished = True
        rest = self._text.finish(ids)
        # Held-back bytes may have completed a stop string only now.
        self.tell(Piece(rest, "stop" if self._text.stopped else finish))
