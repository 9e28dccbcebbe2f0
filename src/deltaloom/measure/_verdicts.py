"""Ways to ask a judge: by likelihood, by the outputs of a classifier, by what it writes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from deltaloom.core.encoding import encode_continuation, encode_labelled
from deltaloom.core.errors import InputError
from deltaloom.core.examples import Example
from deltaloom.core.progress import progress
from deltaloom.measure._judge_prompts import reply, verdict_in

if TYPE_CHECKING:
    from deltaloom.core.run import Run
    from deltaloom.engine.chat import Chat

TOP = 20
"""Likeliest first tokens asked of an endpoint, the most that OpenAI's offers."""
AGAIN = 2
"""Times that an answer without a verdict is asked for again. Ours, as for gradings in skillmix."""
ONLY = "Answer with the verdict and nothing else."


@dataclass(frozen=True)
class Question:
    """One prompt and what may be said."""

    where: str
    prompt: str
    verdicts: tuple[str, ...]


@dataclass(frozen=True)
class Opinion:
    """What a judge said to one question."""

    shares: dict[str, float] = field(default_factory=dict)
    """Probability by verdict, or share of the samples that said it; empty where nothing came."""
    texts: tuple[str, ...] = ()
    """What was written, sample by sample."""
    said: tuple[str | None, ...] = ()
    """The verdict of each sample; None where the text states none."""
    failure: str | None = None

    @property
    def verdict(self) -> str | None:
        """The likeliest one; the first of equals in the order of the verdicts."""
        return max(self.shares, key=self.shares.__getitem__) if self.shares else None


class Judging(Protocol):
    """Whoever gives opinions."""

    cut: int
    """Questions that were too long and lost their beginning (a classifier: their end)."""

    def ask(self, questions: Sequence[Question], run: Run) -> list[Opinion]:
        """An opinion on each question, in order; enters in the run's ledger what it cost."""
        ...


@dataclass
class Likelihood:
    """A causal model: the log-likelihood of `verdict: V` after the prompt, softmax over V."""

    model: Any
    tokenizer: Any
    limit: int
    """Tokens of prompt and verdict; longer prompts are cut from the left."""
    cut: int = 0
    """Prompts cut so far."""

    def ask(self, questions: Sequence[Question], run: Run) -> list[Opinion]:
        """One pass over every question with each of its verdicts."""
        from deltaloom.engine.chat import BaseChat
        from deltaloom.measure._items import scored

        chat = BaseChat(self.model, self.tokenizer, "the judge")
        sequences = []
        for one in questions:
            turn = {"role": "user", "content": one.prompt}
            ids = chat.prompt([turn])
            # As `BaseChat` renders it: through the chat template where there is one.
            row = Example("", "", one.where, prompt=one.prompt)
            if self.tokenizer.chat_template:
                row = replace(row, messages=(turn,), prompt=None)
            answers = [
                encode_continuation(row, ids, reply(verdict), self.tokenizer)
                for verdict in one.verdicts
            ]
            room = self.limit + 1 - max(map(len, answers))
            if room < 1:
                raise InputError(f"{one.where}: the verdicts alone are longer than {self.limit}")
            self.cut += len(ids) > room
            ids = ids[-room:]
            sequences += [(ids + new, [0] * len(ids) + [1] * len(new)) for new in answers]
        values, _ = scored("judge", self.model, self.tokenizer, sequences, run)
        sums = iter([math.fsum(found.tolist()) for found in values])
        return [
            Opinion(softmax({verdict: next(sums) for verdict in one.verdicts}, one.where))
            for one in questions
        ]


@dataclass
class Classes:
    """A sequence classifier whose outputs are called as the verdicts are."""

    model: Any
    tokenizer: Any
    labels: list[str]
    limit: int
    cut: int = 0

    def ask(self, questions: Sequence[Question], run: Run) -> list[Opinion]:
        """One pass over the prompts; softmax over the question's verdicts."""
        from deltaloom.measure._classes import class_logits

        at = {label: number for number, label in enumerate(self.labels)}
        for one in questions:
            unknown = next((verdict for verdict in one.verdicts if verdict not in at), None)
            if unknown is not None:
                raise InputError(
                    f"{one.where}: verdict {unknown!r} is none of the base's labels "
                    f"({', '.join(self.labels)})"
                )
        rows = [
            Example("", "", one.where, prompt=one.prompt, completion=self.labels[0])
            for one in questions
        ]
        encoded = encode_labelled(rows, self.tokenizer, self.limit, self.labels)
        self.cut += sum(row.truncated for row in encoded)
        logits, _ = class_logits(self.model, self.tokenizer, encoded, run)
        return [
            Opinion(softmax({v: float(found[at[v]]) for v in one.verdicts}, one.where))
            for one, found in zip(questions, logits, strict=True)
        ]


@dataclass
class Written:
    """Whoever writes an answer that is read for its verdict, once or in several samples."""

    chat: Chat
    samples: int
    temperature: float
    max_new_tokens: int
    again: bool = False
    """Whether the same question may get another answer, so that prose is asked about again."""
    cut: int = 0

    def ask(self, questions: Sequence[Question], run: Run) -> list[Opinion]:
        """Every sample of every question; a question without any verdict fails."""
        talks = [[{"role": "user", "content": one.prompt}] for one in questions]
        replies = [self._replies(talks, run.seed + sample) for sample in range(self.samples)]
        # A verdict that cannot be read is asked for again, where another answer may come.
        for again in range(1, 1 + AGAIN if self.again else 1):
            for sample, found in enumerate(replies):
                unread = [
                    i
                    for i, (one, reply) in enumerate(zip(questions, found, strict=True))
                    if reply.text is not None and one.verdicts
                    if verdict_in(reply.text, one.verdicts) is None
                ]
                if unread:
                    seed = run.seed + sample + 1000 * again
                    new = self._replies([talks[i] for i in unread], seed)
                    for i, reply in zip(unread, new, strict=True):
                        found[i] = reply
        self.chat.spend(run, [one for found in replies for one in found])
        self.cut += sum(one.cut for one in replies[0])
        return [
            _heard(question, [found[i] for found in replies])
            for i, question in enumerate(questions)
        ]

    def _replies(self, talks: Sequence[Any], seed: int) -> list[Any]:
        with progress("judge", len(talks)) as advance:
            return self.chat.replies(
                talks,
                max_new_tokens=self.max_new_tokens,
                temperature=self.temperature,
                seed=seed,
                on_reply=lambda *_: advance(1),
            )


@dataclass
class FirstToken:
    """An endpoint that tells the likeliest first tokens of its answer."""

    chat: Chat
    cut: int = 0

    def ask(self, questions: Sequence[Question], run: Run) -> list[Opinion]:
        """Probability of each verdict from the first token that no other verdict begins with."""
        talks = [[{"role": "user", "content": one.prompt + ONLY}] for one in questions]
        with progress("judge", len(talks)) as advance:
            replies = self.chat.replies(
                talks,
                max_new_tokens=1,
                top_logprobs=TOP,
                seed=run.seed,
                on_reply=lambda *_: advance(1),
            )
        self.chat.spend(run, replies)
        found = []
        for one, answer in zip(questions, replies, strict=True):
            if answer.failure is not None:
                found.append(Opinion(failure=answer.failure))
                continue
            if not answer.logprobs:
                raise InputError(
                    f"{self.chat.name} tells no log-probabilities; set verdict=generated"
                )
            mass = _first_tokens(answer.logprobs[0], one.verdicts)
            total = sum(mass.values())
            found.append(
                Opinion({v: p / total for v, p in mass.items()})
                if total
                else Opinion(failure=f"the answer begins with no verdict ({answer.text!r})")
            )
        return found


def softmax(scores: Mapping[str, float], where: str) -> dict[str, float]:
    """Shares from log-scores; WorkError naming `where` when they are not finite."""
    top = max(scores.values())
    if not math.isfinite(top):
        from deltaloom.core.errors import WorkError

        raise WorkError(
            f"{where}: the judge gives a log-likelihood of {top}; its weights may be damaged, or "
            "load it with dtype=float32"
        )
    raw = {verdict: math.exp(score - top) for verdict, score in scores.items()}
    total = sum(raw.values())
    return {verdict: value / total for verdict, value in raw.items()}


def _heard(question: Question, replies: Sequence[Any]) -> Opinion:
    texts = tuple(one.text for one in replies if one.text is not None)
    said = tuple(
        None if one.text is None else verdict_in(one.text, question.verdicts) for one in replies
    )
    counts = Counter(verdict for verdict in said if verdict is not None)
    if not counts:
        failures = [one.failure for one in replies if one.failure is not None]
        reason = failures[0] if failures else "the answer states no verdict"
        return Opinion(texts=texts, said=said, failure=reason)
    total = sum(counts.values())
    shares = {verdict: counts[verdict] / total for verdict in question.verdicts}
    return Opinion(shares, texts, said)


def _first_tokens(logprobs: Mapping[str, float], verdicts: Sequence[str]) -> dict[str, float]:
    mass = dict.fromkeys(verdicts, 0.0)
    for token, value in logprobs.items():
        start = token.strip().strip("[*\"'").lower()
        fits = [verdict for verdict in verdicts if start and verdict.lower().startswith(start)]
        exact = [verdict for verdict in fits if verdict.lower() == start]
        for verdict in exact or (fits if len(fits) == 1 else []):
            mass[verdict] += math.exp(value)
    return mass
