"""How much one row, shown as a demonstration, helps a model to answer another (DELIFT)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from deltaloom.core.encoding import encode_continuation, encode_prompt
from deltaloom.core.errors import InputError
from deltaloom.core.features import Features
from deltaloom.engine.forward import padding_token, token_logprobs
from deltaloom.engine.meter import forward_cost
from deltaloom.engine.shards import Job, fill

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from deltaloom.core.base import Base
    from deltaloom.core.examples import Example, Examples
    from deltaloom.core.run import Run
    from deltaloom.engine.forward import Masked

ALONE = "Instruction:\nPlease generate a response to the following query.\n\n\nQuery:\n{prompt}\n"
SHOWN = (
    "Instruction:\nPlease generate a response to the following query, with the example as a "
    "guide.\n\n\nExample:\n{shown}\n{answer}\n\n\nQuery:\n{prompt}\n"
)
MARK = "\u2060answer\u2060"
"""Stands for an answer when a template is asked where it puts one; no text begins or ends so."""
SHARD_ROWS = 32


def utilities(
    folder: Path,
    rows: Examples,
    demonstrations: Examples,
    places: NDArray[Any],
    limit: int,
    base: Base,
    run: Run,
    label: str,
) -> tuple[NDArray[np.float32], int]:
    """UF (n, k): what row i gains from demonstration places[i, k], and how many pairs did not fit.

    UF_ij = d(alone) - d(with j); positive helps. A pair longer than `limit` tokens has utility 0
    and is counted, as all k are of a row that is too long alone. Shards in `folder` are kept.
    Raises InputError for rows that are no question with an answer, WorkError naming a row whose
    probabilities are not numbers.
    """
    about = {
        "what": label,
        "base": base.fingerprint(),
        "rows": rows.digest(),
        "demonstrations": demonstrations.digest(),
        "places": _digest(places),
        "limit": limit,
    }
    width = places.shape[1] + 1  # the last column counts pairs that do not fit
    store = Features.create(folder, rows.ids, width, about=about, shard_rows=SHARD_ROWS)
    fill(store, _Utility(base, rows, demonstrations, places, limit, store), run)
    found = store.matrix()
    return found[:, :-1], int(found[:, -1].sum())


def distance(logprobs: NDArray[np.float32]) -> float:
    """d = || p - 1 ||_2 / sqrt(T) of the T tokens' probabilities: 0 is certain, 1 is hopeless."""
    return float(np.sqrt(np.mean(np.expm1(logprobs.astype(np.float64)) ** 2)))


class Asker:
    """Puts rows to a model: as a conversation if its tokenizer has a template, else as text."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.chats = bool(tokenizer.chat_template)

    def __call__(self, row: Example, shown: Example | None = None) -> Masked:
        """Token ids, and a mask that is 1 on the answer's own tokens (no end mark)."""
        if self.chats or row.messages is not None:
            text, answer = self._chat(row, shown)
            example = replace(row, messages=None, prompt=text)
            # The template has put a beginning of sequence where it wants one.
            before = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        else:
            text, answer = _layout(row, shown)
            example = replace(row, prompt=text)
            before = encode_prompt(example, self.tokenizer)
        whole = encode_prompt(example, self.tokenizer)
        after = encode_continuation(example, whole, answer, self.tokenizer)
        if not after:
            raise InputError(f"{row.where}: the answer is empty; write one or remove the row")
        return before + after, [0] * len(before) + [1] * len(after)

    def _chat(self, row: Example, shown: Example | None) -> tuple[str, str]:
        """The rendered conversation up to the answer, and the answer as rendered.

        Not by the generation prompt, which some templates lack and some continue: what changes
        with the answer is the answer.
        """
        *turns, last = _turns(row)
        if shown is not None:
            own = [turn for turn in _turns(shown) if turn["role"] != "system"]
            first = next(i for i, turn in enumerate(turns) if turn["role"] != "system")
            turns[first:first] = own
        whole = self._render(row, [*turns, last])
        marked = self._render(row, [*turns, {**last, "content": MARK}])
        start = _alike(whole, marked)
        end = _alike(whole[start:][::-1], marked[start:][::-1])
        return whole[:start], whole[start : len(whole) - end]

    def _render(self, row: Example, turns: list[dict[str, str]]) -> str:
        from jinja2 import TemplateError

        if not self.chats:
            raise InputError(
                f"{row.where}: the row is a conversation and the tokenizer has no chat template; "
                "use rows with 'prompt' and 'completion', or a base whose tokenizer has one"
            )
        try:
            return self.tokenizer.apply_chat_template(turns, tokenize=False)
        except TemplateError as error:
            raise InputError(
                f"{row.where}: the chat template refuses the messages ({error})"
            ) from None


def _alike(a: str, b: str) -> int:
    """How many first characters of two texts are the same."""
    same = (x == y for x, y in zip(a, b, strict=False))
    return next((place for place, equal in enumerate(same) if not equal), min(len(a), len(b)))


def _layout(row: Example, shown: Example | None) -> tuple[str, str]:
    """The text up to the answer, and the answer."""
    prompt, answer = question_and_answer(row)
    if shown is None:
        return ALONE.format(prompt=prompt), answer
    shown_prompt, shown_answer = question_and_answer(shown)
    return SHOWN.format(shown=shown_prompt, answer=shown_answer, prompt=prompt), answer


class _Utility(Job):
    """Scores the pairs of one shard's rows."""

    def __init__(
        self,
        base: Base,
        rows: Examples,
        demonstrations: Examples,
        places: NDArray[Any],
        limit: int,
        store: Features,
    ) -> None:
        self.base, self.rows, self.demonstrations = base, rows, demonstrations
        self.places, self.limit, self.store = places, limit, store

    def open(self) -> Callable[[int], dict[str, float]]:
        """Load the model."""
        model, tokenizer = self.base.load(), self.base.tokenizer()
        ask, shards = Asker(tokenizer), self.store.shards()

        def do(number: int) -> dict[str, float]:
            tokens = 0

            def count(_: int, computed: int) -> None:
                nonlocal tokens
                tokens += computed

            asked = [self._asked(ask, i) for i in shards[number]]
            flat = [sequence or ([], []) for row in asked for sequence in row]
            logprobs = iter(token_logprobs(model, flat, padding_token(tokenizer), on_batch=count))
            self.store.write_shard(number, [_gains(row, logprobs) for row in asked])
            return forward_cost(model, tokens)

        return do

    def _asked(self, ask: Asker, i: int) -> list[Masked | None]:
        """Row i alone, then with each demonstration; None where it does not fit."""
        alone = self._fitting(ask(self.rows[i]))
        if alone is None:
            return [None] * (self.places.shape[1] + 1)
        shown = (self.demonstrations[int(j)] for j in self.places[i])
        return [alone, *(self._fitting(ask(self.rows[i], each)) for each in shown)]

    def _fitting(self, sequence: Masked) -> Masked | None:
        return sequence if len(sequence[0]) <= self.limit else None


def _gains(asked: Sequence[Masked | None], logprobs: Any) -> list[float]:
    """Utilities of one row's pairs and how many do not fit; takes as many `logprobs` as asked."""
    alone, *shown = [(sequence is not None, next(logprobs)) for sequence in asked]
    before = distance(alone[1]) if alone[0] else 0.0
    gains = [before - distance(found) if fits else 0.0 for fits, found in shown]
    return [*gains, float(sum(not fits for fits, _ in shown))]


def _turns(row: Example) -> list[dict[str, str]]:
    """A row as a conversation that ends with its answer."""
    if row.messages is None:
        prompt, answer = question_and_answer(row)
        return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    turns = list(row.messages)
    roles = [turn["role"] for turn in turns]
    if len(turns) < 2 or roles[-1] != "assistant" or roles[-2] in ("assistant", "system"):
        raise InputError(
            f"{row.where}: a conversation must end with a question and the assistant's answer"
        )
    return turns


def question_and_answer(row: Example) -> tuple[str, str]:
    """A row's question and answer as texts; raises InputError for a row that has not both."""
    if row.messages is not None:
        *_, question, answer = _turns(row)
        return question["content"], answer["content"]
    if not row.prompt or not row.response:
        raise InputError(
            f"{row.where}: needs a prompt and a response, as one row is shown as an example for "
            "another"
        )
    return row.prompt, row.response


def _digest(places: NDArray[Any]) -> str:
    from hashlib import sha256

    return sha256(np.ascontiguousarray(places, dtype=np.int64).tobytes()).hexdigest()[:16]
