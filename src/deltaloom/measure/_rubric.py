"""Points: k skills, topic, sense and length; given by checks or by a grader, then turned to marks.

A grader's reply counts only when it holds exactly one point for each criterion, as lines
`Point earned: 1` or as rows of a table; anything else is a failed parse, which is missing and never
zero. The length is always counted here, as published.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from deltaloom.core.errors import InputError
from deltaloom.measure._combinations import Combination
from deltaloom.measure._skills import Rules

POINT = re.compile(r"points?\s+earned\W{0,6}?([01])(?:\.0)?(?![\d.]*\d)", re.IGNORECASE)
ROW = re.compile(r"^\s*\|[^|\n]+\|\s*\**\s*([01])(?:\.0)?\s*\**\s*(?:\||$)", re.MULTILINE)
METRICS = ("full_marks", "all_skills", "skill_fraction")


@dataclass(frozen=True)
class Points:
    """One text's points, each 1 or 0."""

    skills: tuple[int, ...]
    topic: int
    sense: int
    length: int

    @property
    def all(self) -> tuple[int, ...]:
        """In the order of the rubric."""
        return (*self.skills, self.topic, self.sense, self.length)

    def marks(self) -> dict[str, float]:
        """The published metrics of one text.

        `full_marks`: every point; `all_skills`: every skill's and two of the other three;
        `skill_fraction`: the share of skills where the other three are earned, else 0.
        """
        rest = self.topic + self.sense + self.length
        shown = sum(self.skills)
        every = shown == len(self.skills)
        return {
            "full_marks": float(every and rest == 3),
            "all_skills": float(every and rest >= 2),
            "skill_fraction": shown / len(self.skills) if rest == 3 else 0.0,
        }


def verify(asked: Combination, rules: Rules, text: str) -> Points:
    """Points by the skills' own checks; raises InputError for a skill or topic without one."""
    shown = []
    for skill in asked.skills:
        if skill.check is None:
            raise InputError(f"skill {skill.name!r} has no check: give a grader=")
        shown.append(int(skill.check(text)))
    if not asked.topic.words:
        raise InputError(f"topic {asked.topic.name!r} has no words: give a grader=")
    return Points(
        tuple(shown),
        int(asked.topic.on_topic(text)),
        int(rules.sense(text)),
        int(rules.short(text, asked.k)),
    )


def parsed(asked: Combination, rules: Rules, text: str, reply: str) -> Points | None:
    """Points that a grader's reply gives; None for a reply that is not as asked."""
    wanted = asked.k + 3
    for shape in (POINT, ROW):
        found = [int(point) for point in shape.findall(reply)]
        if len(found) == wanted:
            *skills, topic, sense, _ = found
            return Points(tuple(skills), topic, sense, int(rules.short(text, asked.k)))
    return None


def majority(gradings: Sequence[Points | None]) -> Points | None:
    """Point by point over the gradings that could be read; a tie earns nothing, as published."""
    read = [one for one in gradings if one is not None]
    if not read:
        return None
    rows = zip(*(one.all for one in read), strict=True)
    *skills, topic, sense, length = [int(2 * sum(row) > len(read)) for row in rows]
    return Points(tuple(skills), topic, sense, length)


def without_named(asked: Combination, text: str, points: Points) -> Points:
    """No point for a skill whose name (before any bracket) stands in the text, as published."""
    flat = text.lower()
    kept = tuple(
        0 if skill.name.lower().split("(")[0].strip() in flat else point
        for skill, point in zip(asked.skills, points.skills, strict=True)
    )
    return Points(kept, points.topic, points.sense, points.length)
