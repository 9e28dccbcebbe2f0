"""What is asked: k skills and a topic, drawn with a seed or read from rows; and how many exist."""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from deltaloom.core.errors import InputError, suggest
from deltaloom.core.examples import Example, Examples
from deltaloom.measure._skills import Skill, Topic


@dataclass(frozen=True)
class Combination:
    """Skills that one text is to show, and its topic."""

    id: str
    skills: tuple[Skill, ...]
    topic: Topic

    @property
    def k(self) -> int:
        """How many skills."""
        return len(self.skills)

    @property
    def key(self) -> tuple[str, ...]:
        """What it is whatever the order of its skills: their names sorted, then the topic's."""
        return key_of([skill.name for skill in self.skills], self.topic.name)

    @property
    def cluster(self) -> str:
        """Its skills: texts on one set of skills belong together whatever their topics."""
        return " + ".join(self.key[:-1])


def key_of(skills: Sequence[str], topic: str) -> tuple[str, ...]:
    """Names of skills, sorted, and the topic."""
    return (*sorted(skills), topic)


def draw(
    skills: Sequence[Skill],
    topics: Sequence[Topic],
    k: int,
    count: int,
    seed: int,
    seen: Collection[tuple[str, ...]] = (),
) -> list[Combination]:
    """`count` random combinations of `k` of the skills on one of the topics.

    Drawn independently, as published, but for two things: none that is in `seen`, and for one
    skill every skill is drawn equally often, since the single rates are what composition is held
    against. Raises InputError for fewer than k skills, and where `seen` leaves (almost) nothing.
    """
    if not topics:
        raise InputError("no topics are left to draw from")
    if k > len(skills):
        raise InputError(f"k = {k}: only {len(skills)} skills are left to draw from")
    rng = random.Random(f"combinations {seed} {k}")
    found: list[Combination] = []
    refused = 0
    deck: list[Skill] = []
    while len(found) < count:
        if k == 1:
            deck = deck or rng.sample(list(skills), len(skills))
            taken = [deck.pop()]
        else:
            taken = rng.sample(list(skills), k)
        made = Combination(f"k{k}-{len(found):04d}", tuple(taken), rng.choice(list(topics)))
        if made.key in seen:
            refused += 1
            if refused > 100 * count:
                raise InputError(
                    f"k = {k}: nearly every combination occurs in seen=; give fewer rows there or "
                    "more skills and topics"
                )
            continue
        found.append(made)
    return found


def listed(
    rows: Examples, skills: Sequence[Skill], topics: Sequence[Topic]
) -> Iterator[Combination]:
    """The combinations that rows name in `skills` and `topic`; InputError names a wrong row."""
    known = {skill.name: skill for skill in skills}
    about = {topic.name: topic for topic in topics}
    for row in rows:
        names, topic = row.extra.get("skills"), row.extra.get("topic")
        if not (isinstance(names, list) and names and isinstance(topic, str)):
            raise InputError(
                f"{row.where}: needs 'skills' (a list of names) and 'topic' (a name) to be asked"
            )
        for name in names:
            if name not in known:
                raise InputError(f"{row.where}: no skill {name!r}{suggest(str(name), known)}")
        if topic not in about:
            raise InputError(f"{row.where}: no topic {topic!r}{suggest(topic, about)}")
        yield Combination(row.id, tuple(known[name] for name in names), about[topic])


def seen_in(rows: Examples) -> set[tuple[str, ...]]:
    """The combinations that rows with `skills` and `topic` are about."""
    found = set()
    for row in rows:
        names, topic = row.extra.get("skills"), row.extra.get("topic")
        if isinstance(names, list) and isinstance(topic, str):
            found.add(key_of([str(name) for name in names], topic))
    return found


def text_of(row: Example) -> str:
    """What a training row teaches to say."""
    if row.messages is not None:
        return row.messages[-1]["content"]
    return row.response or row.text or ""


def possible(skills: int, topics: int, k: int) -> int:
    """How many combinations there are: C(skills, k) topics."""
    return math.comb(skills, k) * topics


def expected_occurrences(rates: Sequence[float], topic_rate: float, sentences: float) -> float:
    """Times that a text with all of these skills and one topic is expected in a corpus.

    Paper: arXiv 2310.17567, section 5: `L p_topic prod p_skill` for independent skills.
    """
    return sentences * topic_rate * math.prod(rates)


def new_at_least(full_marks: float, occurrences: float) -> float | None:
    """The least share of full-mark answers that cannot have been copied: 1 - bound / full marks.

    At most `occurrences` (an expected number, so a bound of the probability) of the combinations
    are in the corpus at all. None where nothing earned full marks.
    """
    return max(0.0, 1.0 - min(1.0, occurrences) / full_marks) if full_marks > 0 else None
