"""Settings of whoever asks for texts that combine skills, to measure or to teach."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from deltaloom.core.errors import InputError, suggest
from deltaloom.core.places import PLACE
from deltaloom.core.run import Run
from deltaloom.core.spec import Spec
from deltaloom.engine.chat import Speaker
from deltaloom.measure._skills import Rules, Skill, Topic, chosen, read_skills, read_topics

if TYPE_CHECKING:
    from deltaloom.engine.chat import Chat

Count = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class Pool:
    """What combinations are drawn from."""

    skills: list[Skill]
    topics: list[Topic]
    rules: Rules
    common: int
    """Skills left out because ordinary text shows them often."""
    unchecked: int
    """Skills left out because only a grader could give their point."""


class Asking(Spec):
    """How texts are asked for and graded."""

    grader: Annotated[Speaker | None, PLACE] = None
    """Who gives the points: `http://host/v1#model` or a base; None takes the skills' own checks."""
    skills: Annotated[str | None, PLACE] = None
    """File of skills; None takes the package's 46, of which 28 have a check."""
    topics: Annotated[str | None, PLACE] = None
    """File of topics; None takes the package's 30."""
    wording: Annotated[str | None, PLACE] = None
    """File of the wordings to ask with; None takes the package's, after the published ones."""
    only: list[str] = []
    """Skills or categories to draw from; all when empty."""
    without: list[str] = []
    """Skills or categories that must not occur: those held out."""
    only_topics: list[str] = []
    """Topics to draw from; all when empty."""
    gradings: Count = 3
    """Gradings of each text by a grader (the paper: 3)."""
    revise: bool = True
    """Whether the text is asked for once more, as an improvement (the paper does)."""
    temperature: Annotated[float, Field(ge=0)] = 0.7
    """Of whoever writes (the paper: 0.7)."""
    grader_temperature: Annotated[float, Field(ge=0)] = 0.7
    """Of the grader (the paper: 0.7)."""
    max_new_tokens: Count = 512
    """Tokens of a reply at most (the paper: 512); half of a base's context where that is less."""
    names_count: bool = False
    """Whether a skill may earn its point in a text that names it (the paper's leaderboard: no)."""
    most_common: Annotated[float, Field(gt=0, le=1)] = 0.05
    """Skills whose `occurs` is at least this are not drawn (the paper: 0.05)."""

    def pool(self) -> Pool:
        """Skills and topics to draw from; raises InputError for a wrong file or name."""
        every, rules = read_skills(self.skills)
        named = chosen(every, self.only, self.without)
        rare = [one for one in named if one.occurs is None or one.occurs < self.most_common]
        usable = rare if self.grader else [one for one in rare if one.check is not None]
        return Pool(usable, self._topics(), rules, len(named) - len(rare), len(rare) - len(usable))

    def _topics(self) -> list[Topic]:
        topics = read_topics(self.topics)
        known: dict[str, Topic] = {topic.name: topic for topic in topics}
        for name in self.only_topics:
            if name not in known:
                raise InputError(f"only_topics: no topic {name!r}{suggest(name, known)}")
        return [known[name] for name in self.only_topics] or topics

    def open_grader(self, run: Run) -> Chat | None:
        """The grader with its replies kept in the run's scratch, if there is one."""
        from deltaloom.engine.chat import open_chat

        if self.grader is None:
            return None
        return open_chat(self.grader, run.work / f"{run.folder.name}-grader.jsonl")


def squeezed(texts: Sequence[str]) -> set[str]:
    """Texts with single spaces, without empty ones: to tell copies by."""
    return {" ".join(text.split()) for text in texts} - {""}
