"""Examples: rows with a stable content id, a source and something to learn from or be asked.

A row is one of: chat `messages` (or ShareGPT `conversations`); `prompt` and `completion` (or the
common other names in `PROMPTS` and `RESPONSES`); plain `text`. A question for measuring has a
prompt and `choices` with `answer` (its index or its text), or a prompt and `answer`. A preference
has a prompt (text or messages) with `chosen` and `rejected`, or those two as whole conversations;
what is preferred stays in `extra`.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from deltaloom.core.atomic import write_text
from deltaloom.core.errors import InputError
from deltaloom.core.reading import rows
from deltaloom.core.spec import canonical, digest

PROMPTS = ("prompt", "instruction", "question")
RESPONSES = ("completion", "output", "response")
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant"}


@dataclass(frozen=True, slots=True)
class Example:
    """One row."""

    id: str
    """Given by the row, else 16 hex digits of its content's SHA-256."""
    source: str
    """Where it came from: the row's `source` or `dataset`, else the file's name."""
    where: str
    """File and line, for messages."""
    messages: tuple[dict[str, str], ...] | None = None
    prompt: str | None = None
    completion: str | None = None
    text: str | None = None
    choices: tuple[str, ...] | None = None
    answers: tuple[str, ...] | None = None
    """Accepted answers; the right choice when there are choices."""
    group: str | None = None
    """Subtask of a target row."""
    cluster: str | None = None
    """What a question shares with others (a passage, a person), for the intervals."""
    weight: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    """Columns this library has no use for, kept as they are."""

    @property
    def response(self) -> str | None:
        """What a model should answer, wherever the row says it."""
        if self.completion is not None:
            return self.completion
        return self.answers[0] if self.answers else None

    def to_row(self) -> dict[str, Any]:
        """The row as it is written to JSONL."""
        row: dict[str, Any] = {"id": self.id, "source": self.source}
        if self.messages is not None:
            row["messages"] = list(self.messages)
        for key in ("prompt", "completion", "text", "group", "cluster", "weight"):
            value = getattr(self, key)
            if value is not None:
                row[key] = value
        if self.choices is not None:
            row["choices"] = list(self.choices)
        if self.answers is not None:
            row["answer"] = self.answers[0] if len(self.answers) == 1 else list(self.answers)
        return {**row, **self.extra}


class Examples(Sequence[Example]):
    """An ordered collection of rows with unique ids."""

    def __init__(self, items: Iterable[Example], name: str = "examples") -> None:
        self._items = tuple(items)
        self.name = name

    @classmethod
    def read(cls, names: str | Path | Sequence[str | Path]) -> Self:
        """Read files, folders or `datasets` ids; raises InputError naming file and line."""
        listed = [names] if isinstance(names, str | Path) else list(names)
        label = ", ".join(str(name) for name in listed) or "no data was named: it"
        found = (
            (parse(*row), row[2].get("id") in (None, ""))
            for name in listed
            for row in rows(str(name))
        )
        items = tuple(_unique_ids(found))
        if not items:
            raise InputError(f"{label}: holds no rows")
        return cls(items, label)

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return type(self)(self._items[index], self.name)
        return self._items[index]

    def __iter__(self) -> Iterator[Example]:
        return iter(self._items)

    @property
    def ids(self) -> list[str]:
        """The ids, in order."""
        return [item.id for item in self._items]

    def take(self, indices: Iterable[int]) -> Self:
        """The rows at `indices`, in that order."""
        return type(self)((self._items[i] for i in indices), self.name)

    def sources(self) -> Counter[str]:
        """How many rows each source has."""
        return Counter(item.source for item in self._items)

    def digest(self) -> str:
        """Sixteen hex digits that change when any row or their order does."""
        # The bytes of `digest` of the list of rows, without all their text in memory at once.
        found = hashlib.sha256(b"[")
        for number, item in enumerate(self._items):
            found.update(("," if number else "").encode() + canonical(item.to_row()).encode())
        found.update(b"]")
        return found.hexdigest()[:16]

    def write(self, path: Path, columns: dict[str, dict[str, Any]] | None = None) -> None:
        """Write JSONL; `columns` maps a column name to values by id, added to the rows."""
        lines = []
        for item in self._items:
            row = item.to_row()
            for name, values in (columns or {}).items():
                if item.id in values:
                    row[name] = values[item.id]
            lines.append(canonical(row) + "\n")
        write_text(path, "".join(lines))


def parse(where: str, default_source: str, row: dict[str, Any]) -> Example:
    """One row as an Example; raises InputError naming `where` for what it cannot be."""
    rest = {key: value for key, value in row.items() if value is not None}
    given_id = rest.pop("id", None)
    source = rest.pop("source", None) or rest.pop("dataset", None) or default_source
    content = _content(where, rest)
    _check_surrogates(where, row)
    group, cluster = rest.pop("group", None), rest.pop("cluster", None)
    weight = rest.pop("weight", None)
    identity = str(given_id) if given_id not in (None, "") else digest(content)
    return Example(
        id=identity,
        source=str(source),
        where=where,
        group=None if group is None else str(group),
        cluster=None if cluster is None else str(cluster),
        weight=None if weight is None else _weight(where, weight),
        extra=rest,
        **content,
    )


def _content(where: str, row: dict[str, Any]) -> dict[str, Any]:
    for key in ("messages", "conversations"):
        if key in row:
            if not isinstance(row[key], list):
                raise InputError(
                    f"{where}: {key!r} must be a list of messages, not {type(row[key]).__name__}"
                )
            return {"messages": _messages(where, row.pop(key))} | _question(where, row)
    if isinstance(row.get("prompt"), list):
        return {"messages": _messages(where, _turns(where, row))}
    if "prompt" not in row and isinstance(row.get("chosen"), list):
        return {"messages": _messages(where, _shared(where, row))}
    prompt = _first(where, row, PROMPTS)
    if prompt is not None:
        extra_input = _first(where, row, ("input",))
        if extra_input is not None and extra_input.strip():
            prompt = f"{prompt}\n\n{extra_input}"
        completion = _first(where, row, RESPONSES)
        content: dict[str, Any] = {"prompt": prompt}
        if completion is not None:
            content["completion"] = completion
        return content | _question(where, row)
    if "text" in row:
        return {"text": _string(where, "text", row.pop("text"))}
    if "input" in row:  # what is asked, where nothing else is
        row["prompt"] = row.pop("input")
        return _content(where, row)
    raise InputError(
        f"{where}: found neither 'messages', 'prompt' nor 'text' among {sorted(row) or 'no fields'}"
    )


def _turns(where: str, row: dict[str, Any]) -> list[Any]:
    """A prompt of messages, and the completion's after it."""
    completion = row.pop("completion", [])
    if not isinstance(completion, list):
        raise InputError(f"{where}: 'prompt' is a list of messages, so 'completion' must be one")
    return [*row.pop("prompt"), *completion]


def _shared(where: str, row: dict[str, Any]) -> list[Any]:
    """What two whole conversations, `chosen` and `rejected`, begin with alike."""
    chosen, rejected = row["chosen"], row.get("rejected")
    if not isinstance(rejected, list):
        raise InputError(f"{where}: 'chosen' is a list of messages, so 'rejected' must be one")
    count = 0
    while count < min(len(chosen), len(rejected)) and chosen[count] == rejected[count]:
        count += 1
    return chosen[:count]


def _question(where: str, row: dict[str, Any]) -> dict[str, Any]:
    answer, choices = row.pop("answer", None), row.pop("choices", None)
    if choices is None:
        if answer is None:
            return {}
        listed = answer if isinstance(answer, list) else [answer]
        if not listed:
            raise InputError(f"{where}: 'answer' is an empty list")
        return {"answers": tuple(str(one) for one in listed)}
    if not isinstance(choices, list) or len(choices) < 2:
        raise InputError(f"{where}: 'choices' must be a list of at least two texts")
    texts = tuple(_string(where, "choices", choice) for choice in choices)
    if isinstance(answer, int) and not isinstance(answer, bool):
        if not 0 <= answer < len(texts):
            raise InputError(f"{where}: answer {answer} is no index into {len(texts)} choices")
        return {"choices": texts, "answers": (texts[answer],)}
    if answer not in texts:
        raise InputError(f"{where}: answer {answer!r} is neither an index nor one of the choices")
    return {"choices": texts, "answers": (answer,)}


def _weight(where: str, weight: Any) -> float:
    try:
        number = math.nan if isinstance(weight, bool) else float(weight)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 <= number < math.inf:
        raise InputError(f"{where}: weight = {weight!r}: must be a number of at least 0")
    return number


def _check_surrogates(where: str, row: dict[str, Any]) -> None:
    try:
        canonical(row).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start].encode("unicode_escape").decode()
        raise InputError(
            f"{where}: holds {half}, half of a surrogate pair, which is no text; remove it"
        ) from None


def _messages(where: str, messages: list[Any]) -> tuple[dict[str, str], ...]:
    turns = []
    for number, turn in enumerate(messages, 1):
        if not isinstance(turn, dict):
            raise InputError(f"{where}: message {number} is not an object with role and content")
        role = turn.get("role", turn.get("from"))
        content = turn.get("content", turn.get("value"))
        if not isinstance(role, str) or not isinstance(content, str):
            raise InputError(f"{where}: message {number} needs 'role' and 'content' as texts")
        turns.append({"role": ROLES.get(role, role), "content": content})
    if not turns:
        raise InputError(f"{where}: 'messages' is empty")
    return tuple(turns)


def _first(where: str, row: dict[str, Any], names: tuple[str, ...]) -> str | None:
    for name in names:
        if name in row:
            return _string(where, name, row.pop(name))
    return None


def _string(where: str, key: str, value: Any) -> str:
    if not isinstance(value, str):
        raise InputError(f"{where}: {key!r} must be a text, not {type(value).__name__}")
    return value


def _unique_ids(found: Iterable[tuple[Example, bool]]) -> Iterator[Example]:
    first: dict[str, str] = {}
    copies: Counter[str] = Counter()
    for item, from_content in found:
        identity = item.id
        if identity in first:
            if not from_content:
                raise InputError(
                    f"{item.where}: id {identity!r} was already used at {first[identity]}; "
                    "make ids unique or leave them out"
                )
            # Equal content without given ids is a duplicate row, which pools do have.
            while item.id in first:
                copies[identity] += 1
                item = replace(item, id=f"{identity}-{copies[identity] + 1}")
        first[item.id] = item.where
        yield item
