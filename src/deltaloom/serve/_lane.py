"""One model and the continuations on it: they join and leave between steps.

A step reads the next piece of the prompts that came in, then one token of every continuation whose
prompt is read: at most two forward passes, whatever the number of tasks.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch

from deltaloom.engine.generate import end_tokens
from deltaloom.serve._continuation import Continuation
from deltaloom.serve._forward import RaggedModel
from deltaloom.serve._sampling import choose
from deltaloom.serve._stack import AdapterStack


@dataclass(frozen=True)
class Limits:
    """How much a model does at once."""

    batch: int
    """Continuations."""
    tokens: int
    """Places of the cache: continuations times the longest that one of them may become."""
    piece: int
    """Prompt tokens, padding included, read between two tokens of the others."""


@dataclass
class Done:
    """What a step did."""

    prompt_tokens: int = 0
    new_tokens: int = 0
    rows: int = 0
    ended: list[Continuation] = field(default_factory=list)


class Lane:
    """A model that answers for its tasks; the worker's thread alone touches it.

    `writer` is a tokenizer that nobody else uses.
    """

    def __init__(self, ragged: RaggedModel, writer: Any, limits: Limits) -> None:
        self.ragged, self.writer, self.limits = ragged, writer, limits
        self.stack = AdapterStack(ragged.model)
        self.ends = frozenset(end_tokens(ragged.model, writer))
        self.waiting: deque[Continuation] = deque()
        self.rows: list[Continuation] = []
        """By row of the cache: first those that generate, then those whose prompts are read."""
        self.ready = 0
        """How many generate."""

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.rows or self.waiting)

    def step(self) -> Done:
        """Admit, read, generate one token each."""
        done = Done()
        self._leave(done)
        self._admit(done)
        if self.ready < len(self.rows):
            self._read_prompts(done)
            self._leave(done)
        if self.ready:
            done.rows = self.ready
            self._continue(done)
            self._leave(done)
        if not self.rows:
            self.ragged.cache.release()
        return done

    def uses(self, adapter: str) -> bool:
        """Whether a continuation here is of this low-rank task."""
        return any(one.adapter == adapter for one in (*self.rows, *self.waiting))

    def sweep(self) -> list[Continuation]:
        """Take the cancelled out of those that wait."""
        gone = [one for one in self.waiting if one.cancelled]
        for one in gone:
            self.waiting.remove(one)
            one.drop("cancelled")
        return gone

    def fail(self, error: str) -> list[Continuation]:
        """End everything that is under way; what waits goes on waiting."""
        ended, self.rows, self.ready = self.rows, [], 0
        for one in ended:
            one.drop("error", error)
        self.ragged.cache.release()
        self.stack.use([])
        return ended

    def _admit(self, done: Done) -> None:
        """First come, first served: nobody overtakes one that does not fit yet."""
        widest = max((one.most for one in self.rows), default=0)
        while self.waiting and len(self.rows) < self.limits.batch:
            one = self.waiting[0]
            widest = max(widest, one.most)
            if self.rows and (len(self.rows) + 1) * widest > self.limits.tokens:
                return
            self.waiting.popleft()
            if one.cancelled:
                one.drop("cancelled")
                done.ended.append(one)
                continue
            one.begin(self.writer)
            self.ragged.cache.begin(len(self.rows), one.prefix)
            self.rows.append(one)

    def _read_prompts(self, done: Done) -> None:
        filling = self.rows[self.ready :]
        width = max(self.limits.piece // len(filling), 1)
        pieces = [list(one.prompt[one.read : one.read + width]) for one in filling]
        logits = self._pass(self.ready, filling, pieces)
        for one, piece in zip(filling, pieces, strict=True):
            one.read += len(piece)
            done.prompt_tokens += len(piece)
        over = [i for i, one in enumerate(filling) if one.read == len(one.prompt)]
        if over:
            self._choose([filling[i] for i in over], logits[over], done)
            first = self.ready
            for i in over:
                self._swap(first + i, self.ready)
                self.ready += 1

    def _continue(self, done: Done) -> None:
        rows = self.rows[: self.ready]
        logits = self._pass(0, rows, [[one.tokens[-1]] for one in rows])
        self._choose(rows, logits, done)

    def _pass(self, first: int, rows: list[Continuation], ids: list[list[int]]) -> torch.Tensor:
        self.stack.use([one.adapter for one in rows])
        return self.ragged.read(first, ids, [one.length for one in rows])

    def _choose(self, rows: list[Continuation], logits: torch.Tensor, done: Done) -> None:
        tokens = choose(logits, [one.sampling for one in rows], [one.draw() for one in rows])
        for one, token in zip(rows, tokens, strict=True):
            if token is None:
                one.drop("error", f"the model of {one.task!r} gave no finite logits")
            else:
                done.new_tokens += 1
                one.take(token, self.ends)

    def _leave(self, done: Done) -> None:
        """Take the finished and the cancelled out; the rows behind close up."""
        for row in reversed(range(len(self.rows))):
            one = self.rows[row]
            if one.cancelled:
                one.drop("cancelled")
            if not one.finished:
                continue
            done.ended.append(one)
            if row < self.ready:
                self.ready -= 1
                self._swap(row, self.ready)
                row = self.ready
            self._swap(row, len(self.rows) - 1)
            self.rows.pop()

    def _swap(self, a: int, b: int) -> None:
        if a != b:
            self.ragged.cache.swap(a, b)
            self.rows[a], self.rows[b] = self.rows[b], self.rows[a]
