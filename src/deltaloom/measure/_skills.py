"""Skills and topics as data: read, checked, and the lists that come with the package.

A skills file is a JSON or YAML list, or an object with the list as `skills`:
`name`, `definition` and `example` (texts), and where they are known `category`, `check` (see
`_checks`) and `occurs`, the share of ordinary sentences that show it. The object may also say how a
text is checked beside its skills: `sense`, a check, and `length`, `{"unit": words or sentences,
"first": n, "each": n}`: at most `first + each (k - 1)` of the unit. A topics file is a list of
names or of `{"name": ..., "words": [...]}`; the words say, where no grader does, that a text is on
topic.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from deltaloom.core.errors import InputError, suggest
from deltaloom.core.spec import canonical, digest
from deltaloom.measure._checks import Check, check, contains, sentences, words

SHIPPED = Path(__file__).parent / "data"


@dataclass(frozen=True)
class Skill:
    """Something that a text can show."""

    name: str
    definition: str
    example: str
    category: str = ""
    occurs: float | None = None
    check: Check | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Topic:
    """What a text can be about."""

    name: str
    words: tuple[str, ...] = ()

    def on_topic(self, text: str) -> bool:
        """Whether one of the topic's words is in the text."""
        return contains(text, any=self.words)


@dataclass(frozen=True)
class Rules:
    """How a text is checked beside its skills, and the whole file's digest."""

    sense: Check
    unit: str | None
    first: int
    each: int
    digest: str

    def limit(self, k: int) -> int:
        """The most sentences (or words) of a text with k skills; published: max(1, k - 1)."""
        return max(1, k - 1) if self.unit is None else self.first + self.each * (k - 1)

    def short(self, text: str, k: int) -> bool:
        """Whether the text keeps to the limit."""
        counted = words(text) if self.unit == "words" else sentences(text)
        return len(counted) <= self.limit(k)


def read_skills(path: str | None) -> tuple[list[Skill], Rules]:
    """Skills and rules of a file, or of the package; raises InputError naming file and entry."""
    file = Path(path) if path else SHIPPED / "skills.json"
    content = _read(file)
    listed = content.get("skills") if isinstance(content, dict) else content
    entries = _entries(listed, file, ("name", "definition", "example"), SKILL_KEYS)
    skills = []
    for where, row in entries:
        test = check(row["check"], where) if row.get("check") else None
        occurs = row.get("occurs")
        if occurs is not None and not (isinstance(occurs, int | float) and 0 <= occurs <= 1):
            raise InputError(f"{where}: occurs = {occurs!r}: must be a share from 0 to 1")
        if test is not None and not test(row["example"]):
            raise InputError(
                f"{where}: the example does not pass the skill's own check; correct one of them"
            )
        skills.append(Skill(row["name"], row["definition"], row["example"],
                            str(row.get("category", "")), occurs, test))  # fmt: skip
    rules = content if isinstance(content, dict) else {}
    return skills, _rules(rules, file, digest(canonical(content)))


def read_topics(path: str | None) -> list[Topic]:
    """Topics of a file, or of the package; raises InputError naming file and entry."""
    file = Path(path) if path else SHIPPED / "topics.json"
    content = _read(file)
    listed = content.get("topics") if isinstance(content, dict) else content
    named = [{"name": one} if isinstance(one, str) else one for one in _list(listed, file)]
    return [
        Topic(row["name"], tuple(row.get("words", ())))
        for _, row in _entries(named, file, ("name",), {"name", "words"})
    ]


def chosen(skills: Sequence[Skill], only: Sequence[str], without: Sequence[str]) -> list[Skill]:
    """The skills of these names or categories; raises InputError for a name that none has."""
    known = {skill.name for skill in skills} | {skill.category for skill in skills} - {""}
    for name in (*only, *without):
        if name not in known:
            raise InputError(f"no skill or category {name!r}{suggest(name, known)}")

    def named(skill: Skill, names: Sequence[str]) -> bool:
        return skill.name in names or skill.category in names

    return [
        skill for skill in skills if (not only or named(skill, only)) and not named(skill, without)
    ]


def plausible(text: str) -> bool:
    """Where no grader reads the text: it has three words, most characters belong to words, and no
    word makes up more than half of five or more. Nonsense made of different words passes.
    """
    found = words(text)
    if len(found) < 3 or sum(map(len, found)) < 0.5 * len(text.strip()):
        return False
    return len(found) < 5 or max(map(found.count, set(found))) <= len(found) / 2


SKILL_KEYS = {"name", "definition", "example", "category", "occurs", "check"}


def _rules(content: dict[str, Any], file: Path, identity: str) -> Rules:
    sense = check(content["sense"], f"{file}: sense") if content.get("sense") else plausible
    length = content.get("length")
    if length is None:
        return Rules(sense, None, 1, 1, identity)
    given = length if isinstance(length, dict) else {}
    unit, first, each = (given.get(key) for key in ("unit", "first", "each"))
    if not (unit in ("words", "sentences") and _is_count(first) and _is_count(each)):
        raise InputError(
            f"{file}: length must be an object like "
            '{"unit": "words", "first": 12, "each": 6} (unit: words or sentences)'
        )
    return Rules(sense, unit, first, each, identity)


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and value >= 0


def _read(file: Path) -> Any:
    import yaml

    try:
        text = file.read_text(encoding="utf-8")
        return json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except FileNotFoundError:
        raise InputError(f"{file}: no such file") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{file} line {error.lineno}: not JSON ({error.msg})") from None
    except yaml.YAMLError as error:
        raise InputError(f"{file}: not YAML ({getattr(error, 'problem', error)})") from None


def _list(content: Any, file: Path) -> list[Any]:
    if not isinstance(content, list) or not content:
        raise InputError(f"{file}: must hold a list with at least one entry")
    return content


def _entries(
    content: Any, file: Path, needed: Sequence[str], known: set[str]
) -> list[tuple[str, dict[str, Any]]]:
    found, names = [], set()
    for number, row in enumerate(_list(content, file), 1):
        where = f"{file}: entry {number}"
        if not isinstance(row, dict):
            raise InputError(f"{where}: must be an object with {', '.join(needed)}")
        for key in needed:
            if not isinstance(row.get(key), str) or not row[key].strip():
                raise InputError(f"{where}: {key!r} must be a text")
        where = f"{where} ({row['name']})"
        wrong = sorted(row.keys() - known)
        if wrong:
            raise InputError(f"{where}: unknown key {wrong[0]!r}{suggest(wrong[0], known)}")
        if row["name"] in names:
            raise InputError(f"{where}: the name is there twice")
        names.add(row["name"])
        found.append((where, row))
    return found
