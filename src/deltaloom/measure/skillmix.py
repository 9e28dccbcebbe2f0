"""Can a model combine skills: short texts that must show k random skills on a random topic.

Paper: Yu, Kaur, Gupta, Brown-Cohen, Goyal and Arora 2023, "Skill-Mix: a Flexible and Expandable
Family of Evaluations for AI models" (arXiv 2310.17567). The efficiency is ours.

Formula: a text is asked for, then once more as a revision, and the revised text is graded: a point
for each of the k skills, for the topic, for sense and for at most max(1, k - 1) sentences. An item
is 1 for all k + 3 points (`full_marks`); `all_skills` asks for every skill and two of the other
three; `skill_fraction` is the share of skills where the other three are earned, else 0. Composition
efficiency at k is the full-marks ratio over the mean product of the skills' ratios at k = 1.

The student is the step's base (and deltas) or `student`; a `grader` gives points by the rubric, by
majority over `gradings`. Without one, points come from the checks in the skills file, exactly and
offline, and skills without a check are left out. Where a grader meets skills that have a check,
`grader_agreement` in the run's notes says how often the two agree.

`skillmix.json` in the run's folder has every metric by k with its interval, every skill by k, the
efficiencies and what could have been copied; `transcripts.jsonl` has every conversation, text,
grading and point, so that any number can be made again. Estimates come for the whole and each k.
A refusal, and a grading in prose, is asked for again; a call that fails in the end, or a grading
that cannot be read, is missing and counted, never zero. Every call is kept until the run is done:
an interrupted one pays for nothing twice.

Differs: texts are averaged over `rounds` and the best of them is reported beside, where the paper
reports the best of three alone; the official code's three gradings are one grading copied, here
they are three; its unread points are zeros; common skills are not drawn, where the paper drops
their combinations afterwards. At k = 1 every skill is drawn equally often. Skills, topics and
wordings are our own.

Not covered: the hidden 90 % of the authors' skills; grading by several graders at once (measure
twice and compare).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, final

from pydantic import Field

from deltaloom.core.atomic import write_json
from deltaloom.core.errors import InputError, WorkError
from deltaloom.core.estimate import Estimate
from deltaloom.core.examples import Examples
from deltaloom.core.method import Measurer, Sizes, Work
from deltaloom.core.places import PLACE
from deltaloom.core.run import Run
from deltaloom.engine.chat import Speaker
from deltaloom.engine.endpoint import Endpoint
from deltaloom.measure import _composition as composition
from deltaloom.measure._asking import Asking, Count, Pool, squeezed
from deltaloom.measure._combinations import (
    Combination,
    draw,
    expected_occurrences,
    listed,
    new_at_least,
    possible,
    seen_in,
    text_of,
)
from deltaloom.measure._items import note
from deltaloom.measure._mixing import Mixed, Mixing, commonest_failure, keep_transcripts
from deltaloom.measure._rubric import METRICS
from deltaloom.measure._wording import read_wording

if TYPE_CHECKING:
    from deltaloom.engine.chat import Chat


@final
class SkillMix(Asking, Measurer):
    """Full marks for texts that show k skills at once."""

    optional: ClassVar[frozenset[str]] = frozenset({"tasks"})
    trial: ClassVar[dict[str, Any]] = {"combinations": 4, "k": [1, 3], "max_new_tokens": 8}

    student: Annotated[Speaker | None, PLACE] = None
    """Who is measured where no base is: `http://host/v1#model`, or a base that is no step's."""
    k: Annotated[list[Count], Field(min_length=1)] = [1, 2, 3, 4, 5]
    """How many skills a text must show (the paper: 2 to 6; 1 is for the efficiency)."""
    combinations: Count = 100
    """Combinations for each k (the paper: 100 where GPT-4 grades)."""
    rounds: Count = 1
    """Texts for each combination (the paper: 3, of which it takes the best)."""
    seen: list[str] = []
    """Files of rows with `skills` and `topic` that the student was trained on: their combinations
    are not drawn, and answers that are copies of their texts are counted."""
    corpus_sentences: Annotated[float | None, Field(gt=0)] = None
    """Sentences of the pretraining corpus, for the bound on what can have been copied."""
    topic_rate: Annotated[float, Field(gt=0, le=1)] = 1e-6
    """Share of its sentences about one topic (the paper's order of magnitude)."""
    skill_rate: Annotated[float, Field(gt=0, le=1)] = 0.05
    """Share that shows a skill, for skills without `occurs` (ours: the limit of `most_common`)."""

    @property
    def subject(self) -> str | None:
        """The student's name."""
        if self.student is None:
            return None
        return self.student.model.rstrip("/").rpartition("/")[2]

    def work(self, sizes: Sizes) -> Work:
        """Two turns for each combination and round; a question is about 60 tokens and 40 a skill
        (ours, of the package's wording). What endpoints do is not counted.
        """
        texts = len(self.k) * self.combinations * self.rounds
        asked = 60 + 40 * sum(self.k) / len(self.k)
        turns = (1 + self.revise) * asked + (1 + 2 * self.revise) * self.max_new_tokens
        return Work(forward_tokens=texts * turns, memory_bytes=sizes.weight_bytes)

    def measure(
        self, model: Any, tokenizer: Any, data: Examples, run: Run
    ) -> Estimate | dict[str, Estimate]:
        """Ask every combination and grade the texts; items are full marks, averaged over rounds.

        With rows in `data` their `skills` and `topic` are asked instead of drawn ones. Raises
        InputError for a wrong file, a name nobody has, too few skills, and a base and a `student`
        at once; WorkError when no text could be scored at all.
        """
        pool, seen = self.pool(), Examples.read(self.seen) if self.seen else Examples([])
        asked = self._asked(pool, seen, data, run.seed)
        mixing = Mixing(
            self, pool.rules, read_wording(self.wording), self._student(model, tokenizer, run),
            self.open_grader(run),
        )  # fmt: skip
        mixed = mixing.texts(asked, self.rounds, run.seed)
        cost = mixing.spend(run)
        marked = [one.marked for one in mixed if one.marked is not None]
        keep_transcripts(run, mixed)
        counts = _counts(mixed, pool, seen)
        note(run, **counts)
        if not marked:
            raise WorkError(f"no text could be scored: {commonest_failure(mixed)}")
        planned = Counter(one.k for one in asked)
        parts = composition.by_k(marked, dict(sorted(planned.items())), self.rounds)
        document = {
            **composition.tables(marked, parts, run.seed),
            "novelty": {
                str(k): self._novelty(pool, seen, [one for one in marked if one.asked.k == k])
                for k in sorted(parts)
            },
            "counts": counts,
            "skills": [skill.name for skill in pool.skills],
            "topics": [topic.name for topic in pool.topics],
            "grader": _called(self.grader),
            "rules": pool.rules.digest,
        }
        write_json(run.folder / "skillmix.json", document)
        whole = composition.estimate(
            marked, METRICS[0], missing=len(asked) - len(marked), cost=cost
        )
        assert whole is not None
        return {"": whole, **{f"k{k}": found[METRICS[0]] for k, found in parts.items()}}

    def _asked(self, pool: Pool, seen: Examples, data: Examples, seed: int) -> list[Combination]:
        if len(data):
            return list(listed(data, pool.skills, pool.topics))
        return [
            one
            for k in dict.fromkeys(self.k)
            for one in draw(pool.skills, pool.topics, k, self.combinations, seed, seen_in(seen))
        ]

    def _student(self, model: Any, tokenizer: Any, run: Run) -> Chat:
        from deltaloom.engine.chat import BaseChat, Kept, open_chat

        file = run.work / f"{run.folder.name}-student.jsonl"
        if self.student is None:
            return Kept(BaseChat(model, tokenizer, run.folder.name), file)
        if model is not None:
            raise InputError("skillmix: both base= and student= say who is measured; give one")
        return open_chat(self.student, file)

    def _novelty(
        self, pool: Pool, seen: Examples, own: Sequence[composition.Marked]
    ) -> dict[str, Any]:
        """How many combinations there are, and how many could have been met before."""
        k, before = own[0].asked.k, seen_in(seen)
        found: dict[str, Any] = {
            "possible": possible(len(pool.skills), len(pool.topics), k),
            "seen": sum(one.asked.key in before for one in own) if self.seen else None,
        }
        if self.corpus_sentences is not None:
            bounds = [
                expected_occurrences(
                    [self.skill_rate if s.occurs is None else s.occurs for s in one.asked.skills],
                    self.topic_rate,
                    self.corpus_sentences,
                )
                for one in own
            ]
            mean = sum(min(1.0, bound) for bound in bounds) / len(bounds)
            full = sum(one.mean["full_marks"] for one in own) / len(own)
            found |= {"met_at_most": mean, "new_at_least": new_at_least(full, mean)}
        return found


def _counts(mixed: Sequence[Mixed], pool: Pool, seen: Examples) -> dict[str, Any]:
    """What went wrong or is worth a look, counted over all texts."""
    texts = [one for item in mixed for one in item.rounds]
    counts: dict[str, Any] = {
        "failed_texts": sum(one.text is None for one in texts),
        "unread_gradings": sum(one.unread for one in texts),
        "ungraded_texts": sum(one.text is not None and one.points is None for one in texts),
        "cut_prompts": sum(one.cut for one in texts),
        "unfinished_replies": sum(one.unfinished for one in texts),
        "named_skills": sum(one.named for one in texts),
        "common_skills_left_out": pool.common,
        "unchecked_skills_left_out": pool.unchecked,
    }
    copies = squeezed([text_of(row) for row in seen])
    if copies:
        counts["copied_texts"] = sum(" ".join((one.text or "").split()) in copies for one in texts)
    checked = [same for one in texts for same in one.agreement]
    if checked:
        counts["grader_checked_points"] = len(checked)
        counts["grader_agreement"] = sum(checked) / len(checked)
    return counts


def _called(speaker: Any) -> str | None:
    if isinstance(speaker, Endpoint):
        return f"{speaker.url}#{speaker.model}"
    return None if speaker is None else speaker.model
