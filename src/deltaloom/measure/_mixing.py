"""Asking for the texts and grading them: every conversation of a Skill-Mix measurement."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from deltaloom.core.atomic import write_text
from deltaloom.core.progress import progress
from deltaloom.core.spec import canonical
from deltaloom.measure import _rubric as rubric
from deltaloom.measure._combinations import Combination
from deltaloom.measure._composition import Marked
from deltaloom.measure._rubric import METRICS, Points
from deltaloom.measure._skills import Rules
from deltaloom.measure._wording import Wording, asked_of, grading

if TYPE_CHECKING:
    from deltaloom.core.run import Run
    from deltaloom.engine.chat import Chat, Conversation, Reply
    from deltaloom.measure._asking import Asking


REFUSAL = re.compile(
    r"(?:I['’]m sorry|I am sorry|Sorry|I apologi[sz]e|Unfortunately)?\W*(?:but )?"
    r"(?:as an AI[^,]*, )?I (?:can['’]?t|can ?not|won['’]t|will not|"
    r"am (?:unable|not able)|['’]?m (?:unable|not able)) (?:to )?"
    r"(?:help|assist|comply|do|provide|write|create|generate|fulfil)",
    re.IGNORECASE,
)
APART = 999_999
"""Between the seeds of equal questions: beyond all other offsets."""
AGAIN = 2
"""Times that a grading in prose is asked for again. Ours."""


@dataclass
class Text:
    """One text for one combination, from its first question to its points."""

    conversation: list[dict[str, str]]
    text: str | None = None
    points: Points | None = None
    failure: str | None = None
    gradings: list[str | None] = field(default_factory=list)
    unread: int = 0
    named: int = 0
    cut: bool = False
    unfinished: bool = False
    agreement: list[bool] = field(default_factory=list)
    """For each point that a check gives as well, whether the grader agrees."""


@dataclass
class Mixed:
    """A combination with its texts, one a round."""

    asked: Combination
    rounds: list[Text]

    @property
    def numbers(self) -> range:
        """Of the rounds."""
        return range(len(self.rounds))

    @property
    def failures(self) -> list[str]:
        """Why texts or gradings are missing."""
        return [one.failure for one in self.rounds if one.failure]

    @property
    def marked(self) -> Marked | None:
        """The marks over the rounds that were scored; None when none was."""
        scored = [one.points for one in self.rounds if one.points is not None]
        if not scored:
            return None
        marks = [one.marks() for one in scored]
        names = [skill.name for skill in self.asked.skills]
        return Marked(
            self.asked,
            {key: sum(one[key] for one in marks) / len(marks) for key in METRICS},
            {key: max(one[key] for one in marks) for key in METRICS},
            {
                name: sum(one.skills[i] for one in scored) / len(scored)
                for i, name in enumerate(names)
            },
        )

    def row(self, number: int) -> dict[str, Any]:
        """A line of the transcripts."""
        one = self.rounds[number]
        points = one.points
        return {
            "id": self.asked.id,
            "k": self.asked.k,
            "skills": [skill.name for skill in self.asked.skills],
            "topic": self.asked.topic.name,
            "round": number,
            "conversation": one.conversation,
            "text": one.text,
            "points": None
            if points is None
            else {
                **dict(zip((s.name for s in self.asked.skills), points.skills, strict=True)),
                "[topic]": points.topic,
                "[sense]": points.sense,
                "[length]": points.length,
            },
            "full_marks": None if points is None else points.marks()["full_marks"],
            "gradings": one.gradings,
            "failure": one.failure,
        }


def keep_transcripts(run: Run, mixed: Sequence[Mixed]) -> None:
    """Write every text's way, a line each, to `transcripts.jsonl` in the run's folder."""
    rows = [json.dumps(one.row(n), ensure_ascii=False) for one in mixed for n in one.numbers]
    write_text(run.folder / "transcripts.jsonl", "".join(f"{row}\n" for row in rows))


def commonest_failure(mixed: Sequence[Mixed]) -> str:
    """Why most of the missing texts are missing."""
    why = Counter(failure for one in mixed for failure in one.failures)
    return why.most_common(1)[0][0] if why else "no text was written"


def refuses(wording: Wording, reply: str) -> bool:
    """Whether a reply is a refusal in prose: it begins like one and gives no answer."""
    if wording.answer is not None and wording.answer in reply:
        return False
    return bool(REFUSAL.match(reply.strip()))


class Mixing:
    """The conversations with student and grader."""

    def __init__(
        self, how: Asking, rules: Rules, wording: Wording, student: Chat | None, grader: Chat | None
    ) -> None:
        self.how, self.rules, self.wording = how, rules, wording
        self.student, self.grader = student, grader

    def texts(self, asked: Sequence[Combination], rounds: int, seed: int) -> list[Mixed]:
        """Ask for every text of every round, and grade it."""
        mixed = [Mixed(one, []) for one in asked]
        for number in range(rounds):
            for item, text in zip(mixed, self._round(asked, seed + 1000 * number), strict=True):
                item.rounds.append(text)
        self.grade(mixed, seed)
        return mixed

    def grade(self, mixed: Sequence[Mixed], seed: int) -> None:
        """Give every text its points."""
        written = [
            (item.asked, one) for item in mixed for one in item.rounds if one.text is not None
        ]
        if self.grader is None:
            for asked, one in written:
                one.points = rubric.verify(asked, self.rules, str(one.text))
        else:
            self._by_grader(self.grader, written, seed)
        for asked, one in written:
            if one.points is None:
                one.failure = one.failure or "grader: no grading could be read"
            elif not self.how.names_count:
                before = one.points
                one.points = rubric.without_named(asked, str(one.text), before)
                one.named = sum(before.skills) - sum(one.points.skills)

    def spend(self, run: Run) -> dict[str, float]:
        """Enter both speakers' cost in the ledger, added up."""
        total: dict[str, float] = {}
        for chat in (self.student, self.grader):
            for key, amount in (chat.spend(run, ()) if chat is not None else {}).items():
                total[key] = total.get(key, 0.0) + amount
        return total

    def _round(self, asked: Sequence[Combination], seed: int) -> list[Text]:
        wording, texts = self.wording, []
        for one in asked:
            first = wording.fill(wording.ask, one, self.rules)
            texts.append(Text(asked_of(wording, [first])))
        self._say("texts", texts, seed)
        if self.how.revise and wording.revise is not None:
            for one, text in zip(asked, texts, strict=True):
                if text.failure is None:
                    more = wording.fill(wording.revise, one, self.rules)
                    text.conversation.append({"role": "user", "content": more})
            self._say("revisions", [one for one in texts if one.failure is None], seed)
        for text in texts:
            if text.failure is None:
                text.text = wording.text(text.conversation[-1]["content"])
        return texts

    def _say(self, label: str, texts: Sequence[Text], seed: int) -> None:
        """Continue each conversation by the student's reply."""
        assert self.student is not None
        how = self.how.max_new_tokens, self.how.temperature
        talks = [one.conversation for one in texts]
        found = self._ask(label, self.student, talks, *how, seed)
        refused = [i for i, one in enumerate(found) if refuses(self.wording, one.text or "")]
        second = self._ask(label, self.student, [talks[i] for i in refused], *how, seed + 500)
        for i, reply in zip(refused, second, strict=True):
            found[i] = reply
        for one, reply in zip(texts, found, strict=True):
            one.cut, one.unfinished = one.cut or reply.cut, not reply.finished
            if reply.text is None:
                one.failure = f"student: {reply.failure}"
            elif refuses(self.wording, reply.text):
                one.failure = f"student: refused: {reply.text[:80]}"
            else:
                one.conversation.append({"role": "assistant", "content": reply.text})

    def _ask(
        self,
        label: str,
        chat: Chat,
        conversations: Sequence[Conversation],
        max_new_tokens: int,
        temperature: float,
        seed: int,
    ) -> list[Reply]:
        """One reply each; what is asked several times is drawn several times, by seeds apart."""
        if not conversations:
            return []
        times: Counter[str] = Counter()
        turns: dict[int, list[int]] = {}
        for i, conversation in enumerate(conversations):
            asked = canonical(list(conversation))
            turns.setdefault(times[asked] if temperature else 0, []).append(i)
            times[asked] += 1
        replies: dict[int, Reply] = {}
        with progress(label, len(conversations)) as advance:
            for number, chosen in turns.items():
                found = chat.replies(
                    [conversations[i] for i in chosen],
                    max_new_tokens=max_new_tokens,
                    temperature=temperature,
                    seed=seed + APART * number,
                    on_reply=lambda number, reply: advance(1),
                )
                replies |= dict(zip(chosen, found, strict=True))
        return [replies[i] for i in range(len(conversations))]

    def _by_grader(
        self, grader: Chat, written: Sequence[tuple[Combination, Text]], seed: int
    ) -> None:
        asked = [
            asked_of(self.wording, [grading(one, self.rules, str(text.text))])
            for one, text in written
        ]
        for number in range(self.how.gradings):
            # A point is a line of some ten tokens; the rest is for a model that says more.
            room = 64 + 32 * max((one.k + 3 for one, _ in written), default=0)
            left = list(range(len(written)))
            replies: dict[int, Reply] = {}
            for again in range(1 + AGAIN):
                found = self._ask(
                    "gradings",
                    grader,
                    [asked[i] for i in left],
                    room,
                    self.how.grader_temperature,
                    seed + number + 300 * again,
                )
                replies |= dict(zip(left, found, strict=True))
                left = [i for i in left if self._in_prose(written[i], replies[i])]
            for i, (_, text) in enumerate(written):
                text.gradings.append(replies[i].text)
                if replies[i].text is None:
                    text.failure = f"grader: {replies[i].failure}"
        for one, text in written:
            read = [
                None if said is None else rubric.parsed(one, self.rules, str(text.text), said)
                for said in text.gradings
            ]
            text.unread = sum(grade is None for grade in read)
            text.points = rubric.majority(read)
            if text.points is not None:
                text.failure = None
                self._compare(one, text, text.points)

    def _in_prose(self, written: tuple[Combination, Text], reply: Reply) -> bool:
        """Whether the grader answered, and not as it was asked."""
        one, text = written
        if reply.text is None:
            return False
        return rubric.parsed(one, self.rules, str(text.text), reply.text) is None

    def _compare(self, asked: Combination, text: Text, points: Points) -> None:
        for skill, point in zip(asked.skills, points.skills, strict=True):
            if skill.check is not None:
                text.agreement.append(point == int(skill.check(str(text.text))))
