"""Checks that decide from a text alone whether it shows a skill: no grader, no error rate.

A check is `{"kind": NAME, ...parameters}` in a skills file. Each kind is one function here;
`CHECKS` is the table of them. Words are runs of letters, digits and apostrophes, compared in lower
case unless the check is about case.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

from deltaloom.core.errors import InputError, suggest

WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
NUMBER = re.compile(r"(?<![\w.])-?\d+(?:,\d{3})*(?:\.\d+)?(?![\w])")
ENDS = re.compile(r"[.!?]+[\"'”’)\]]*(?:\s+|$)(?=[\"'“‘(\[]*[A-Z0-9]|$)")
"""Where a sentence ends: its mark, then a space and a capital or number, or the end."""
TITLES = re.compile(r"\b(Mr|Mrs|Ms|Dr|Prof|St|vs|etc|e\.g|i\.e)\.")

Check = Callable[[str], bool]


def words(text: str) -> list[str]:
    """The text's words, in lower case."""
    return [word.lower() for word in WORD.findall(text)]


def sentences(text: str) -> list[str]:
    """The text's sentences; a last one may lack its mark."""
    plain = TITLES.sub(lambda found: found[0].replace(".", "\0"), text.strip())
    ends = [found.end() for found in ENDS.finditer(plain)]
    parts = (plain[a:b].replace("\0", ".").strip() for a, b in pairwise([0, *ends, len(plain)]))
    return [part for part in parts if part]


def clauses(text: str) -> list[str]:
    """What stands between punctuation marks or line ends."""
    return [part.strip() for part in re.split(r"[.!?;:,\n]+", text) if words(part)]


def lines(text: str) -> list[str]:
    """The lines that are not empty."""
    return [line.strip() for line in text.splitlines() if line.strip()]


def numbers(text: str) -> list[float]:
    """The numbers written in digits, in order."""
    return [float(one.replace(",", "")) for one in NUMBER.findall(text)]


UNITS: dict[str, Callable[[str], int]] = {
    "words": lambda text: len(words(text)),
    "sentences": lambda text: len(sentences(text)),
    "lines": lambda text: len(lines(text)),
    "characters": len,
    "numbers": lambda text: len(numbers(text)),
    "questions": lambda text: sum(one.rstrip("\"'”’)").endswith("?") for one in sentences(text)),
    "distinct words": lambda text: len(set(words(text))),
}


def pattern(text: str, *, pattern: str, count: int = 1, case: bool = False) -> bool:
    """A regular expression is found at least `count` times."""
    return len(re.findall(pattern, text, 0 if case else re.IGNORECASE)) >= count


def without(text: str, *, pattern: str) -> bool:
    """A regular expression is found nowhere, in a text that has a word."""
    return bool(words(text)) and not re.search(pattern, text, re.IGNORECASE)


def contains(text: str, *, any: Sequence[str], count: int = 1) -> bool:
    """At least `count` of the words and phrases stand in the text."""
    flat = f" {' '.join(words(text))} "
    return sum(f" {' '.join(words(one))} " in flat for one in any) >= count


def amount(
    text: str, *, of: str, least: int = 0, most: int | None = None, multiple: int = 1
) -> bool:
    """How many of a unit there are: at least, at most, a multiple of."""
    found = UNITS[of](text)
    return least <= found and (most is None or found <= most) and found % multiple == 0


def alliteration(text: str, *, run: int = 3) -> bool:
    """So many words in a row begin with one letter; the same word twice is no alliteration."""
    found = words(text)
    return any(
        len({word[0] for word in part}) == 1 and len(set(part)) == run
        for part in (found[i : i + run] for i in range(len(found) - run + 1))
    )


def same_start(text: str, *, of: str = "sentences", count: int = 2, length: int = 1) -> bool:
    """So many sentences, lines or clauses in a row begin with the same words."""
    return _run([tuple(words(one)[:length]) for one in _parts(text, of)], count, length)


def same_end(text: str, *, of: str = "sentences", count: int = 2, length: int = 1) -> bool:
    """So many sentences, lines or clauses in a row end with the same words."""
    return _run([tuple(words(one)[-length:]) for one in _parts(text, of)], count, length)


def rhyme(text: str, *, of: str = "lines", letters: int = 2) -> bool:
    """Two lines in a row end in different words with the same last letters."""
    last = [words(one)[-1] for one in _parts(text, of) if words(one)]
    return any(
        a != b and len(a) >= letters and a[-letters:] == b[-letters:] for a, b in pairwise(last)
    )


def acrostic(text: str, *, of: str = "lines", least: int = 3, word: str | None = None) -> bool:
    """First letters spell `word`; without one, they follow the alphabet without a gap."""
    found = "".join(words(one)[0][0] for one in _parts(text, of) if words(one))
    if word is not None:
        return found == word.lower()
    return len(found) >= least and all(ord(b) - ord(a) == 1 for a, b in pairwise(found))


def repeated(text: str, *, times: int = 2, together: bool = True) -> bool:
    """One word several times: in a row, or anywhere when not `together`."""
    found = words(text)
    if not together:
        return any(found.count(word) >= times for word in set(found) if len(word) > 3)
    return any(len(set(found[i : i + times])) == 1 for i in range(len(found) - times + 1))


def chiasmus(text: str, *, gap: int = 3) -> bool:
    """A, B, then B, A: two words of four letters or more in mirrored order, a few words apart."""
    found = [word for word in words(text) if len(word) > 3]
    return any(
        found[i] == found[m] and found[j] == found[k] and found[i] != found[j]
        for i in range(len(found))
        for j in range(i + 1, min(i + 1 + gap, len(found)))
        for k in range(j + 1, min(j + 1 + gap, len(found)))
        for m in range(k + 1, min(k + 1 + gap, len(found)))
    )


def palindrome(text: str, *, least: int = 3) -> bool:
    """A word that reads the same backwards."""
    return any(len(word) >= least and word == word[::-1] for word in words(text))


def growing(text: str, *, of: str = "words", least: int = 4) -> bool:
    """So many words in a row, each longer than the one before; or all numbers, each larger."""
    sizes = numbers(text) if of == "numbers" else [len(word) for word in words(text)]
    if of == "numbers":
        return len(sizes) >= least and all(a < b for a, b in pairwise(sizes))
    return any(
        all(a < b for a, b in pairwise(sizes[i : i + least])) for i in range(len(sizes) - least + 1)
    )


def total(text: str, *, least: int = 3) -> bool:
    """Of the text's numbers, the last is the sum of all before."""
    found = numbers(text)
    return len(found) >= least and abs(sum(found[:-1]) - found[-1]) < 1e-9


def equation(text: str) -> bool:
    """A true sum, difference or product stands in the text, as `2 + 3 = 5`."""
    number = r"(-?\d+(?:\.\d+)?)"
    rule = rf"{number}\s*([-+*x×−])\s*{number}\s*=\s*{number}"
    for a, sign, b, c in re.findall(rule, text):
        x, y = float(a), float(b)
        value = {"+": x + y, "-": x - y, "−": x - y}.get(sign, x * y)
        if abs(value - float(c)) < 1e-9:
            return True
    return False


def json_object(text: str, *, least: int = 1) -> bool:
    """A JSON object with so many keys stands in the text."""
    for start in (found.start() for found in re.finditer(r"\{", text)):
        try:
            value, _ = json.JSONDecoder().raw_decode(text[start:])
        except ValueError:
            continue
        if isinstance(value, dict) and len(value) >= least:
            return True
    return False


def grammar(text: str, *, classes: Mapping[str, Sequence[str]], pattern: str) -> bool:
    """Every word, split at spaces, has a class, and the classes' letters match a pattern whole."""
    letters = _letters(json.dumps(classes, sort_keys=True))
    found = [letters.get(word) for word in text.split()]
    return None not in found and bool(re.fullmatch(pattern, "".join(map(str, found))))


CHECKS: dict[str, Callable[..., bool]] = {
    found.__name__.replace("_", " "): found
    for found in (
        *(pattern, without, contains, amount, alliteration, same_start, same_end, rhyme, acrostic),
        *(repeated, chiasmus, palindrome, growing, total, equation, json_object, grammar),
    )
}
"""Every kind of check by the name that a skills file gives."""


def check(given: Mapping[str, Any], where: str) -> Check:
    """The check that a skills file describes; raises InputError naming `where`."""
    kind = given.get("kind")
    if kind not in CHECKS:
        raise InputError(f"{where}: no check of kind {kind!r}{suggest(str(kind), CHECKS)}")
    function = CHECKS[kind]
    settings = {key: value for key, value in given.items() if key != "kind"}
    known = set(inspect.signature(function).parameters) - {"text"}
    wrong = sorted(settings.keys() - known)
    if wrong:
        raise InputError(f"{where}: check {kind!r}: no parameter {wrong[0]!r}"
                         f"{suggest(wrong[0], known)}")  # fmt: skip
    try:
        function("A first text. A second one.", **settings)
    except KeyError as error:
        raise InputError(f"{where}: check {kind!r}: no unit {error}{suggest('', UNITS)}") from None
    except (TypeError, AttributeError, re.error) as error:
        raise InputError(f"{where}: check {kind!r}: {error}") from None
    return lambda text: function(text, **settings)


def _parts(text: str, of: str) -> list[str]:
    return {"sentences": sentences, "lines": lines, "clauses": clauses}[of](text)


def _run(keys: Sequence[tuple[str, ...]], count: int, length: int) -> bool:
    """So many equal keys of full length in a row."""
    return any(
        len(set(part)) == 1 and len(part[0]) == length
        for part in (keys[i : i + count] for i in range(len(keys) - count + 1))
    )


@cache
def _letters(classes: str) -> dict[str, str]:
    return {word: letter for letter, members in json.loads(classes).items() for word in members}
