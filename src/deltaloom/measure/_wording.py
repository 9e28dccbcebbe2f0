"""What a student and a grader are asked, in words: ours after the published ones, or a file's.

A file of wordings is a JSON or YAML object: `ask` and `revise` with `{skills}` (names), `{topic}`,
`{details}` (a line a skill with definition and example) and `{limit}` (as "2 sentences"); `revise`
null asks one turn. `separator` joins the names, and `answer` and `end` are the marks that the
graded text lies between (null: the whole reply).
"""

from __future__ import annotations

import json
import string
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deltaloom.core.errors import InputError, suggest
from deltaloom.measure._combinations import Combination
from deltaloom.measure._skills import Rules

ASK = """\
Please write a short, natural piece of text, up to a few lines, in the context of {topic}, that \
shows all of the following skills: {skills}. Keep the text as short as possible, and make sure \
that every skill can be found in the text itself.

What the skills are:
{details}

Start the text with 'Answer:' and, after it, say with 'Explanation:' how each skill is shown. The \
text may have at most {limit}. Do not name the skills in the text."""
REVISE = """\
Thank you. Now look over your answer and improve it: it should show all of the skills better and \
stay on the topic, and it may have at most {limit}. Give the improved text again after 'Answer:', \
and the reasons after 'Explanation:'."""
GRADE = """\
You grade a text that a student wrote. The student was asked for a short piece of text about \
{topic} that shows these skills:
{details}

The student's text:
\"\"\"
{text}
\"\"\"

Judge each criterion by the text alone. A skill counts only if it is really shown, not if it is \
merely named.
{criteria}

Answer with one line for each criterion, in this order, and nothing else. A line is the number of \
the criterion and 'Point earned: 1' or 'Point earned: 0'."""
FIELDS = {"skills", "topic", "details", "limit"}


@dataclass(frozen=True)
class Wording:
    """How a combination is asked for and where in the reply the text is."""

    ask: str = ASK
    revise: str | None = REVISE
    separator: str = ", "
    answer: str | None = "Answer:"
    end: str | None = "Explanation"

    def fill(self, wording: str, asked: Combination, rules: Rules) -> str:
        """A wording with its fields filled in."""
        return wording.format(
            skills=self.separator.join(skill.name for skill in asked.skills),
            topic=asked.topic.name,
            details=details(asked),
            limit=limit(asked, rules),
        )

    def text(self, reply: str) -> str:
        """The text to be graded: what follows the last mark, up to the end mark."""
        found = reply if self.answer is None else reply.split(self.answer)[-1]
        found = found if self.end is None else found.split(self.end)[0]
        # Models set the marks in bold, and the rest of that would stay on both sides.
        return found.strip().strip("*#").strip()


def read_wording(path: str | None) -> Wording:
    """The package's wording, or a file's; raises InputError naming file and field."""
    if path is None:
        return Wording()
    import yaml

    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
        content: Any = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except FileNotFoundError:
        raise InputError(f"{file}: no such file") from None
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{file}: not readable ({error})") from None
    known = set(Wording.__dataclass_fields__)
    if not isinstance(content, dict) or not isinstance(content.get("ask"), str):
        raise InputError(f"{file}: must be an object with a text 'ask'")
    for key, value in content.items():
        if key not in known:
            raise InputError(f"{file}: unknown key {key!r}{suggest(str(key), known)}")
        if not isinstance(value, str) and (value is not None or key in ("ask", "separator")):
            raise InputError(f"{file}: {key!r} must be a text")
    for key in ("ask", "revise"):
        _check_fields(content.get(key) or "", f"{file}: {key!r}")
    return replace(Wording(), **content)


def details(asked: Combination) -> str:
    """A line a skill: its name, what it is, an example."""
    return "\n".join(
        f"**{skill.name}**: {skill.definition} For example: {skill.example}"
        for skill in asked.skills
    )


def limit(asked: Combination, rules: Rules) -> str:
    """The most that a text may have, in words."""
    number, unit = rules.limit(asked.k), rules.unit or "sentences"
    return f"{number} {unit[:-1] if number == 1 else unit}"


def criteria(asked: Combination, rules: Rules) -> list[str]:
    """The rubric: a point for each skill, then topic, sense and length (k + 3 points)."""
    return [
        *(f"Correctly illustrates {skill.name}" for skill in asked.skills),
        f"Pertains to {asked.topic.name}",
        "The text makes sense",
        f"At most {limit(asked, rules)}",
    ]


def grading(asked: Combination, rules: Rules, text: str) -> str:
    """The grader's prompt."""
    numbered = "\n".join(f"{n}. {one}" for n, one in enumerate(criteria(asked, rules), 1))
    return GRADE.format(
        topic=asked.topic.name, details=details(asked), text=text, criteria=numbered
    )


def asked_of(wording: Wording, turns: Sequence[str]) -> list[dict[str, str]]:
    """Turns of user and assistant in alternation, beginning with the user's."""
    roles = ("user", "assistant")
    return [{"role": roles[n % 2], "content": text} for n, text in enumerate(turns)]


def _check_fields(wording: str, where: str) -> None:
    try:
        named = {name for _, name, _, _ in string.Formatter().parse(wording) if name is not None}
    except ValueError as error:
        raise InputError(f"{where}: {error}; write {{{{ for a brace") from None
    wrong = sorted(named - FIELDS)
    if wrong:
        raise InputError(f"{where}: unknown field {{{wrong[0]}}}{suggest(wrong[0], FIELDS)}")
