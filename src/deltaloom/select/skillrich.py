"""Rows to learn composition from: short texts that show k skills at once, full marks only.

Paper: Zhao, Kaur, Yu, Goyal and Arora 2024, "Can Models Learn Skill Composition from Examples?"
(arXiv 2409.19808); texts are asked for and graded as in Skill-Mix (arXiv 2310.17567).

Formula: k is drawn from `k`, then k of the training skills and a topic; the text is written,
revised and graded, and kept when it earns all k + 3 points. Held out by construction are the
skills in `without`, every k that is not in `k`, and topics outside `only_topics`: they occur in no
row.

Texts come from `writer`, else from the step's base; or they are there already: rows of `pool` with
`skills`, `topic` and a response are graded, and those with full marks are kept, at random where
there are more than `count`. `split.json` in the run's folder says what was drawn from and what was
held out, `transcripts.jsonl` how every text came about. Rows carry their `skills` and `topic`, so
that `measure skillmix seen=...` can keep them out of its questions.

Differs: the paper writes with GPT-4 alone; skills, topics and wordings are our own. A row's answer
is the writer's last reply whole, as a model is asked for it.

Not covered: the second grader that the paper checks the first one by (`measure skillmix` with
another `grader` does that), and skills found by a model.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, final

from pydantic import Field

from deltaloom.core.atomic import write_json
from deltaloom.core.errors import InputError, WorkError
from deltaloom.core.examples import Example, Examples
from deltaloom.core.features import Features
from deltaloom.core.method import Selection, Selector, Sizes, Work
from deltaloom.core.places import PLACE
from deltaloom.core.progress import say
from deltaloom.core.run import Run
from deltaloom.core.spec import digest
from deltaloom.engine.chat import Speaker
from deltaloom.measure._asking import Asking, Count, Pool
from deltaloom.measure._combinations import Combination, draw, listed, text_of
from deltaloom.measure._mixing import Mixed, Mixing, Text, commonest_failure, keep_transcripts
from deltaloom.measure._wording import Wording, read_wording

if TYPE_CHECKING:
    from deltaloom.core.base import Base


BATCH = 128
"""Texts asked for at once at the least, as few rows may need many tries. Ours."""


@final
class SkillRich(Asking, Selector):
    """Composed texts with full marks."""

    optional: ClassVar[frozenset[str]] = frozenset({"pool"})
    trial: ClassVar[dict[str, Any]] = {
        **{"only": ["lipogram in u", "words by fives"], "k": [1], "count": 2, "tries": 250},
        **{"max_new_tokens": 16, "temperature": 1.0, "revise": False},
        "only_topics": ["gardening", "cooking", "libraries", "coffee", "clocks"],
    }

    writer: Annotated[Speaker | None, PLACE] = None
    """Who writes the texts; None is the step's base. Not looked at where there is a pool."""
    k: Annotated[list[Count], Field(min_length=1)] = [1, 2, 3]
    """How many skills a row may show (the paper: 1 to 3; nothing above is ever seen)."""
    count: Count = 4000
    """Rows to keep (the paper: 13,957 in all; it says that a few thousand are enough)."""
    tries: Count = 4
    """Texts asked for at most, times `count` (ours)."""
    form: Literal["messages", "prompt"] = "messages"
    """Whether a row is a conversation or a prompt with a completion."""

    def work(self, sizes: Sizes) -> Work:
        """As many texts as are kept, at the least; nothing for a pool graded by checks."""
        if sizes.rows:
            return Work()
        tokens = self.count * (1 + self.revise) * (100 + 40 * max(self.k) + self.max_new_tokens)
        return Work(forward_tokens=tokens, memory_bytes=sizes.weight_bytes)

    def keeps(self, sizes: Sizes) -> int:
        """At most `count`."""
        return min(self.count, sizes.rows) if sizes.rows else self.count

    def select(
        self, pool: Examples, run: Run, *, target: Examples | None, base: Base | None
    ) -> Selection:
        """Grade the pool's rows, or write rows until `count` are kept or `tries` are used up.

        Raises InputError for a wrong file or name, a pool's row that is not as above, and no one to
        write; WorkError when nothing earned full marks.
        """
        drawn = self.pool()
        write_json(run.folder / "split.json", self._split(drawn))
        wording = read_wording(self.wording)
        if len(pool):
            return self._from_pool(pool, drawn, wording, run)
        chat = self._writer(base, run)
        mixing = Mixing(self, drawn.rules, wording, chat, self.open_grader(run))
        mixed: list[Mixed] = []
        kept: list[Mixed] = []
        while len(kept) < self.count and len(mixed) < self.tries * self.count:
            asked = self._draw(drawn, len(mixed), run.seed)
            new = mixing.texts(asked, 1, run.seed + 7919 * len(mixed))
            mixed += new
            kept += [one for one in new if self._good(one.rounds[0])]
            say(f"skillrich: {len(kept)} of {len(mixed)} texts kept, {self.count} wanted")
        mixing.spend(run)
        keep_transcripts(run, mixed)
        run.note(asked_texts=len(mixed), kept_texts=min(len(kept), self.count))
        if not kept:
            why = commonest_failure(mixed) if any(one.failures for one in mixed) else (
                "none earned full marks; take a stronger writer, a smaller k or more tries"
            )  # fmt: skip
            raise WorkError(f"no text of {len(mixed)} was kept: {why}")
        rows = (self._row(one, n) for n, one in enumerate(kept[: self.count]))
        return Selection(Examples(rows, "skillrich"))

    def _good(self, text: Text) -> bool:
        return text.points is not None and all(text.points.all)

    def _draw(self, drawn: Pool, done: int, seed: int) -> list[Combination]:
        """The next combinations to ask for, k drawn evenly."""
        rng = random.Random(f"skillrich {seed} {done}")
        size = min(max(self.count, BATCH), self.tries * self.count - done)
        ks = [rng.choice(self.k) for _ in range(size)]
        each = {
            k: iter(draw(drawn.skills, drawn.topics, k, ks.count(k), hash_of(seed, done)))
            for k in dict.fromkeys(ks)
        }
        return [next(each[k]) for k in ks]

    def _writer(self, base: Base | None, run: Run) -> Any:
        from deltaloom.engine.chat import open_chat

        speaker = self.writer or base
        if speaker is None:
            raise InputError("skillrich: nobody to write: give base=, writer= or a pool= of texts")
        return open_chat(speaker, run.work / "writer.jsonl")

    def _from_pool(self, pool: Examples, drawn: Pool, wording: Wording, run: Run) -> Selection:
        every = self.model_copy(update={"only": [], "without": []}).pool()
        asked = list(listed(pool, every.skills, every.topics))
        mixed = []
        for row, one in zip(pool, asked, strict=True):
            text = Text([], text=wording.text(text_of(row)))
            mixed.append(Mixed(one, [text]))
        mixing = Mixing(self, drawn.rules, wording, None, self.open_grader(run))
        mixing.grade(mixed, run.seed)
        mixing.spend(run)
        keep_transcripts(run, mixed)
        allowed = {skill.name for skill in drawn.skills}
        topics = {topic.name for topic in drawn.topics}
        fits = [
            one.k in self.k
            and all(skill.name in allowed for skill in one.skills)
            and one.topic.name in topics
            for one in asked
        ]
        good = [self._good(one.rounds[0]) for one in mixed]
        places = [i for i in range(len(pool)) if good[i] and fits[i]]
        run.note(held_out_rows=fits.count(False), rows_without_full_marks=good.count(False))
        if not places:
            raise WorkError(
                f"none of {len(pool)} rows is kept: {good.count(False)} lack full marks, "
                f"{fits.count(False)} are held out"
            )
        if len(places) > self.count:
            places = sorted(random.Random(f"skillrich {run.seed}").sample(places, self.count))
        values = [float(g and f) for g, f in zip(good, fits, strict=True)]
        scores = Features.from_scores(
            run.work / "scores", pool.ids, values, about={"method": "skillrich"}
        )
        return Selection(pool.take(places), scores)

    def _row(self, one: Mixed, number: int) -> Example:
        conversation = one.rounds[0].conversation
        ask, answer = conversation[0]["content"], conversation[-1]["content"]
        names = [skill.name for skill in one.asked.skills]
        content: dict[str, Any] = {"prompt": ask, "completion": f" {answer.strip()}"}
        if self.form == "messages":
            content = {"messages": ({"role": "user", "content": ask},
                                    {"role": "assistant", "content": answer})}  # fmt: skip
        return Example(
            f"skillrich-{number:05d}",
            f"k{one.asked.k}",
            "skillrich",
            extra={"skills": names, "topic": one.asked.topic.name},
            **content,
        )

    def _split(self, drawn: Pool) -> dict[str, Any]:
        every = self.model_copy(update={"only": [], "without": [], "only_topics": []}).pool()
        return {
            "k": self.k,
            "skills": [skill.name for skill in drawn.skills],
            "held_out_skills": _rest(every.skills, drawn.skills),
            "topics": [topic.name for topic in drawn.topics],
            "held_out_topics": _rest(every.topics, drawn.topics),
            "rules": drawn.rules.digest,
        }


def hash_of(seed: int, done: int) -> int:
    """A seed for one batch of draws."""
    return int(digest([seed, done])[:8], 16)


def _rest(every: Sequence[Any], taken: Sequence[Any]) -> list[str]:
    names = {one.name for one in taken}
    return [one.name for one in every if one.name not in names]
