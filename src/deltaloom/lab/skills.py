"""A closed world of skills: every one has an exact check and a writer, and all combine freely.

A text is one sentence of a small grammar. Each of twenty skills fills a place of its own in it, so
that any set of them can be written at once and none follows from another. `skill_records` and
`topic_records` are the files that `measure skillmix` and `select skillrich` read; `write` composes.
`HELD_OUT` are the five, one of each category, that the composition claim leaves out.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

ASK = "{topic} {skills} =>"
"""How a model is asked: a token for the topic, one for each skill, and the sign to begin."""

TOPICS: dict[str, str] = {
    "farm": "cow hen barn plough hay",
    "sea": "ship gull wave anchor crab",
    "school": "pupil desk chalk lesson map",
    "kitchen": "oven soup ladle jar bun",
    "forest": "oak fox moss owl trail",
    "court": "judge witness lawyer verdict oath",
    "stage": "actor curtain script mask drum",
    "mountain": "peak goat rope cave ledge",
    "market": "merchant stall coin crate fig",
    "garden": "rose spade hedge snail pond",
    "hospital": "nurse ward pill bandage clinic",
    "railway": "train signal porter tunnel track",
    "castle": "knight moat tower banner gate",
    "office": "clerk stamp folder printer memo",
    "desert": "camel dune cactus lizard oasis",
    "workshop": "hammer bench saw nail lathe",
}
VERBS = ["finds", "leaves", "watches", "follows", "needs", "fears"]
ADJECTIVES = ["old", "small", "loud", "dark", "heavy", "strange"]
INITIALS = {
    "a": "agile", "b": "big", "c": "calm", "d": "dull", "f": "fine", "g": "grand", "h": "hot",
    "j": "just", "k": "kind", "l": "low", "m": "mild", "n": "new", "o": "odd", "p": "pale",
    "r": "round", "s": "sad", "t": "tall", "v": "vain", "w": "wet",
}  # fmt: skip
"""An adjective for each first letter that a noun has."""
NUMBERS = ["two", "three", "four", "five", "six"]
COLOURS = ["red", "blue", "green", "white", "black"]
TIMES = ["yesterday", "today", "tonight", "tomorrow"]
HEDGES = ["perhaps", "maybe", "possibly", "probably"]
ADDRESSES = ["friend", "reader", "neighbour", "child"]
OXYMORA = ("bitter sweetness", "silent noise", "frozen fire", "living death")
MOODS = ["gladly", "sadly", "slowly", "quickly"]
CRIES = ["OH", "AH", "HEY", "ALAS"]
PLACES = ["here", "there", "outside", "nearby"]

SKILLS: tuple[tuple[str, str, str], ...] = (
    ("address", "frame", "Somebody is spoken to, before a comma."),
    ("cry", "frame", "An interjection in capitals begins the sentence."),
    ("hedge", "frame", "A word that weakens the claim."),
    ("time", "frame", "A word that says when."),
    ("condition", "logic", "A condition with if."),
    ("reason", "logic", "A reason with because."),
    ("concession", "logic", "A concession with although."),
    ("negation", "logic", "The main verb is denied."),
    ("number", "noun", "The subject is counted."),
    ("colour", "noun", "The object has a colour."),
    ("alliteration", "noun", "An adjective and its noun begin with one letter."),
    ("list", "noun", "The object is a list of three."),
    ("simile", "figure", "A comparison with like."),
    ("comparison", "figure", "A comparison with more and than."),
    ("oxymoron", "figure", "Two words that contradict each other."),
    ("repetition", "figure", "One word twice in a row."),
    ("parenthesis", "form", "A remark in brackets."),
    ("quotation", "form", "Words in quotation marks."),
    ("mood", "form", "An adverb of manner before the verb."),
    ("place", "form", "A word that says where, at the end."),
)
"""Name, category and definition of every skill."""
NAMES = tuple(name for name, _, _ in SKILLS)
CATEGORIES = tuple(dict.fromkeys(category for _, category, _ in SKILLS))
HELD_OUT = ("hedge", "reason", "alliteration", "oxymoron", "parenthesis")
"""One of each category, which training leaves out."""


def write(topic: str, skills: Sequence[str], rng: random.Random) -> str:
    """One sentence about the topic that shows these skills and no other."""
    nouns = [one for _ in range(3) for one in rng.sample(TOPICS[topic].split(), 5)]
    shown = set(skills)

    def noun() -> str:
        return nouns.pop()

    def of(words: Sequence[str]) -> str:
        return rng.choice(words)

    subject, thing = noun(), noun()
    parts = [
        of(CRIES) if "cry" in shown else "",
        f"{of(ADDRESSES)} ," if "address" in shown else "",
        of(HEDGES) if "hedge" in shown else "",
        of(TIMES) if "time" in shown else "",
        f"if the {noun()} {of(VERBS)} ," if "condition" in shown else "",
        f"although the {noun()} {of(VERBS)} ," if "concession" in shown else "",
        f"the {of(NUMBERS)}" if "number" in shown else "the",
        f"{INITIALS[subject[0]]}" if "alliteration" in shown else "",
        f"very very {of(ADJECTIVES)}" if "repetition" in shown else "",
        subject,
        f"( a {of(ADJECTIVES)} {noun()} )" if "parenthesis" in shown else "",
        of(MOODS) if "mood" in shown else "",
        f"never {of(VERBS)}" if "negation" in shown else of(VERBS),
        f'the word " {noun()} " and' if "quotation" in shown else "",
        f"the {of(OXYMORA)} of" if "oxymoron" in shown else "",
        f"the {of(COLOURS)} {thing}" if "colour" in shown else f"the {thing}",
        f", the {noun()} and the {noun()}" if "list" in shown else "",
        f"more than the {noun()}" if "comparison" in shown else "",
        f"like a {noun()}" if "simile" in shown else "",
        f"because the {noun()} {of(VERBS)}" if "reason" in shown else "",
        of(PLACES) if "place" in shown else "",
        ".",
    ]
    return " ".join(part for part in parts if part)


def skill_records() -> dict[str, Any]:
    """What a skills file holds: every skill with its check, the grammar as sense, the length."""
    rng = random.Random(0)
    nouns = _alternatives(_nouns())
    same = "|".join(
        rf"{adjective} (?:very very \w+ )?{letter}\w+" for letter, adjective in INITIALS.items()
    )
    patterns = {
        "address": rf"(?:{_alternatives(ADDRESSES)}) ,",
        "cry": rf"^(?:{_alternatives(CRIES)}) ",
        "hedge": rf"\b(?:{_alternatives(HEDGES)})\b",
        "time": rf"\b(?:{_alternatives(TIMES)})\b",
        "condition": r"\bif the \w+ \w+ ,",
        "reason": r"\bbecause the \w+ \w+",
        "concession": r"\balthough the \w+ \w+ ,",
        "negation": rf"\bnever (?:{_alternatives(VERBS)})\b",
        "number": rf"\bthe (?:{_alternatives(NUMBERS)})\b",
        "colour": rf"\b(?:{_alternatives(COLOURS)}) (?:{nouns})\b",
        "alliteration": rf"\b(?:{same})\b",
        "list": rf"the (?:\w+ )?(?:{nouns}) , the (?:{nouns}) and the (?:{nouns})\b",
        "simile": rf"\blike a (?:{nouns})\b",
        "comparison": rf"\bmore than the (?:{nouns})\b",
        "oxymoron": rf"\b(?:{_alternatives(OXYMORA)})\b",
        "repetition": r"\b(\w+) \1\b",
        "parenthesis": r"\( \w+ \w+ \w+ \)",
        "quotation": r'" \w+ "',
        "mood": rf"\b(?:{_alternatives(MOODS)})\b",
        "place": rf"\b(?:{_alternatives(PLACES)}) \.$",
    }
    return {
        "skills": [
            {
                "name": f"[{name}]",
                "category": category,
                "definition": definition,
                "example": write(next(iter(TOPICS)), [name], rng),
                "check": {"kind": "pattern", "pattern": patterns[name], "case": True},
            }
            for name, category, definition in SKILLS
        ],
        "sense": {"kind": "grammar", "classes": _classes(), "pattern": _grammar()},
        # A plain sentence has five words; no skill adds more than six.
        "length": {"unit": "words", "first": 11, "each": 6},
    }


def topic_records() -> list[dict[str, Any]]:
    """What a topics file holds."""
    return [{"name": f"<{topic}>", "words": words.split()} for topic, words in TOPICS.items()]


def wording() -> dict[str, Any]:
    """What a file of wordings holds: one turn of control tokens, and the whole reply is graded."""
    return {"ask": ASK, "revise": None, "separator": " ", "answer": None, "end": None}


def record(topic: str, skills: Sequence[str], text: str) -> dict[str, Any]:
    """A composed text as a row to learn from or to choose."""
    names = [f"[{name}]" for name in skills]
    prompt = ASK.format(topic=f"<{topic}>", skills=" ".join(names))
    return {
        "prompt": " ".join(prompt.split()),
        "completion": f" {text}",
        "skills": names,
        "topic": f"<{topic}>",
        "source": f"k{len(skills)}",
    }


def compose(ks: Sequence[int], count: int, seed: int, wrong: float = 0.0) -> list[dict[str, Any]]:
    """`count` rows with sets of `ks` skills, drawn from all; a share `wrong` lacks one of them."""
    rng = random.Random(f"compose {seed}")
    topics: list[str] = list(TOPICS)
    rows: list[dict[str, Any]] = []
    for _ in range(count):
        skills = rng.sample(NAMES, rng.choice(list(ks)))
        topic = rng.choice(topics)
        left = skills[1:] if skills and rng.random() < wrong else skills
        rows.append(record(topic, skills, write(topic, left, rng)))
    return rows


def _nouns() -> list[str]:
    return sorted({word for words in TOPICS.values() for word in words.split()})


def _alternatives(words: Sequence[str]) -> str:
    return "|".join(words)


def _classes() -> dict[str, list[str]]:
    """Word classes by letter, for the grammar."""
    return {
        "N": _nouns(),
        "V": list(VERBS),
        "A": list(ADJECTIVES),
        "I": sorted(INITIALS.values()),
        "U": list(NUMBERS),
        "C": list(COLOURS),
        "T": list(TIMES),
        "H": list(HEDGES),
        "D": list(ADDRESSES),
        "X": [pair.split()[0] for pair in OXYMORA],
        "Y": [pair.split()[1] for pair in OXYMORA],
        "M": list(MOODS),
        "R": list(CRIES),
        "P": list(PLACES),
        "t": ["the"], "a": ["a"], ",": [","], ".": ["."], "(": ["("], ")": [")"], "q": ['"'],
        "i": ["if"], "l": ["although"], "v": ["very"], "n": ["never"], "w": ["word"],
        "&": ["and"], "o": ["of"], "m": ["more"], "h": ["than"], "k": ["like"], "b": ["because"],
    }  # fmt: skip


def _grammar() -> str:
    """Every place once, in order, each but subject, verb and object optional."""
    return (
        r"R?(?:D,)?H?T?(?:itNV,)?(?:ltNV,)?tU?I?(?:vvA)?N(?:\(aAN\))?M?n?V(?:twqNq&)?(?:tXYo)?"
        r"tC?N(?:,tN&tN)?(?:mhtN)?(?:kaN)?(?:btNV)?P?\."
    )


def vocabulary() -> list[str]:
    """Every token: special, control, then words."""
    control = [record["name"] for record in (*topic_records(), *skill_records()["skills"])]
    listed = {word for members in _classes().values() for word in members}
    return ["<pad>", "<s>", "</s>", "<unk>", *control, "=>", *sorted(listed)]
