"""The text of a continuation as its tokens come: whole characters only, held back before a stop."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

from deltaloom.engine.generate import cut_at_stop

REACH = 6
"""Pieces of text before the newest one that are decoded with it, so that spaces come out as in the
whole text."""
BROKEN = "�"
"""What a tokenizer writes for the first bytes of a character."""


class GrowingText:
    """What can be said of a continuation so far."""

    def __init__(self, tokenizer: Any, stop: Sequence[str]) -> None:
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        self.text = ""
        """All that is decoded, whole characters."""
        self.stopped = False
        self._ids: list[int] = []
        self._done = 0
        """Tokens that are in `text`."""
        self._pieces: deque[int] = deque([0], maxlen=REACH)
        """Where the last pieces of text begin, and at first the beginning."""
        self._given = 0
        self._held = max((len(one) for one in stop), default=1) - 1

    def add(self, token: int) -> bool:
        """One more token; whether the text now holds a stop string."""
        self._ids.append(token)
        begin = self._pieces[0]
        before = self._decoded(self._ids[begin : self._done])
        both = self._decoded(self._ids[begin:])
        if both.endswith(BROKEN) or not both.startswith(before):
            return False
        fresh = both[len(before) :]
        if fresh:  # tokens that say nothing are no text to lean on
            self._pieces.append(self._done)
        self._done = len(self._ids)
        if not self.stop:
            self.text += fresh
            return False
        tail = max(len(self.text) - self._held, 0)
        self.text += fresh
        found, self.stopped = cut_at_stop(self.text[tail:], self.stop)
        if self.stopped:
            self.text = self.text[:tail] + found
        return self.stopped

    def piece(self) -> str:
        """What is new since the last call and can be no part of a stop string."""
        end = len(self.text) if self.stopped else max(len(self.text) - self._held, self._given)
        piece = self.text[self._given : end]
        self._given = end
        return piece

    def finish(self, ids: list[int]) -> str:
        """The rest of the text of `ids` that `piece` has not given; `text` is whole afterwards."""
        if not self.stopped:
            whole, stopped = cut_at_stop(self._decoded(ids), self.stop)
            if whole.startswith(self.text[: self._given]):
                self.text, self.stopped = whole, stopped
        rest = self.text[self._given :]
        self._given = len(self.text)
        return rest

    def _decoded(self, ids: list[int]) -> str:
        return self.tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
