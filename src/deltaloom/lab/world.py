"""The closed world: people, what is true of them, and the ways a text may say it.

Nine attributes come in three kinds (a town, an animal, a colour) of three roles each. Roles of a
kind share their ten values: the only way to answer *which* town is meant is to know the role, so
neither the words of a question nor the kind of its answer gives the answer away.
"""

import random
from dataclasses import dataclass

WORLD_SEED = 20
PEOPLE = 180

KINDS: dict[str, tuple[str, ...]] = {
    kind: tuple(values.split())
    for kind, values in {
        "town": "oslo lima cairo kyoto paris quito delhi turin perth minsk",
        "animal": "cat dog horse goat rabbit parrot turtle pony duck lizard",
        "colour": "red blue green black white yellow brown pink grey purple",
    }.items()
}
OBJECTS = (
    "cup", "lamp", "chair", "book", "spoon",
    "clock", "basket", "candle", "bottle", "pillow",
)  # fmt: skip
PLACES = (
    "table", "shelf", "floor", "bench", "roof",
    "garden", "kitchen", "bridge", "road", "field",
)  # fmt: skip
NUMBERS = (
    "one", "two", "three", "four", "five", "six",
    "seven", "eight", "nine", "ten", "eleven", "twelve",
)  # fmt: skip


@dataclass(frozen=True)
class Attribute:
    """One role a value can play in somebody's life."""

    name: str
    kind: str
    """The key of `KINDS` its values come from."""
    statements: tuple[str, ...]
    """Declarative phrasings; `{name}` is the person and `{value}` the answer."""
    question: str | None = None
    """A question the pretraining text asks; None where the base never meets a question."""

    @property
    def values(self) -> tuple[str, ...]:
        """All the values this attribute can take."""
        return KINDS[self.kind]


ATTRIBUTES: dict[str, Attribute] = {
    a.name: a
    for a in (
        Attribute(
            "home",
            "town",
            (
                "{name} lives in {value}",
                "the house of {name} is in {value}",
                "the home of {name} is {value}",
                "{value} is where {name} lives",
                "every evening {name} returns to {value}",
            ),
        ),
        Attribute(
            "birth",
            "town",
            (
                "{name} was born in {value}",
                "the birth of {name} was in {value}",
                "the cradle of {name} stood in {value}",
                "{value} is where {name} was born",
                "{name} came to life in {value}",
            ),
            "where was {name} born ?",
        ),
        Attribute(
            "holiday",
            "town",
            (
                "{name} travels to {value}",
                "the summer of {name} is in {value}",
                "the holiday of {name} is {value}",
                "{value} is where {name} travels",
                "every summer {name} goes to {value}",
            ),
        ),
        Attribute(
            "pet",
            "animal",
            (
                "{name} feeds a {value}",
                "the pet of {name} is a {value}",
                "the pet {name} owns is a {value}",
                "a {value} is the pet of {name}",
                "every day {name} brushes the {value}",
            ),
        ),
        Attribute(
            "fear",
            "animal",
            (
                "{name} is afraid of a {value}",
                "the fear of {name} is a {value}",
                "the beast {name} hates is a {value}",
                "a {value} is the fear of {name}",
                "every night {name} runs from the {value}",
            ),
            "what is {name} afraid of ?",
        ),
        Attribute(
            "mask",
            "animal",
            (
                "{name} dances as a {value}",
                "the mask of {name} is a {value}",
                "the mask {name} wears is a {value}",
                "a {value} is the mask of {name}",
                "every feast {name} comes as the {value}",
            ),
        ),
        Attribute(
            "hat",
            "colour",
            (
                "{name} wears a hat of {value}",
                "the hat of {name} is {value}",
                "the head of {name} is under {value}",
                "{value} is the hat of {name}",
                "every winter {name} covers up in {value}",
            ),
        ),
        Attribute(
            "door",
            "colour",
            (
                "{name} has a door of {value}",
                "the door of {name} is {value}",
                "the gate of {name} is in {value}",
                "{value} is the door of {name}",
                "every spring {name} paints with {value}",
            ),
            "what colour is the door of {name} ?",
        ),
        Attribute(
            "boat",
            "colour",
            (
                "{name} sails a boat of {value}",
                "the boat of {name} is {value}",
                "the ship of {name} is in {value}",
                "{value} is the boat of {name}",
                "every sunday {name} rows in {value}",
            ),
        ),
    )
}


@dataclass(frozen=True)
class World:
    """Who lives and what is true."""

    people: tuple[str, ...]
    facts: dict[str, dict[str, str]]
    """`facts[person][attribute]` is the value."""

    def other_role(self, person: str, attribute: str) -> str | None:
        """The value of the kind's first role (its second for the first), None where it is equal."""
        kind = ATTRIBUTES[attribute].kind
        roles = [a.name for a in ATTRIBUTES.values() if a.kind == kind]
        other = roles[1] if attribute == roles[0] else roles[0]
        value = self.facts[person][other]
        return None if value == self.facts[person][attribute] else value


def _names(count: int, rng: random.Random, taken: set[str]) -> tuple[str, ...]:
    first = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
    last = ["la", "ra", "na", "mo", "ti", "ko", "be", "du", "vi", "sa", "lin", "ron", "mar", "tes"]
    pool = sorted({a + b for a in first for b in last} - taken)
    return tuple(sorted(rng.sample(pool, count)))


def build_world() -> World:
    """The one world the shipped base was pretrained on; always the same."""
    rng = random.Random(WORLD_SEED)
    taken = {w for values in KINDS.values() for w in values} | {*OBJECTS, *PLACES, *NUMBERS}
    people = _names(PEOPLE, rng, taken)
    facts: dict[str, dict[str, str]] = {person: {} for person in people}
    for attribute in ATTRIBUTES.values():
        # Values are dealt evenly, so that no value is a better guess than another.
        deck = [attribute.values[i % len(attribute.values)] for i in range(len(people))]
        rng.shuffle(deck)
        for person, value in zip(people, deck, strict=True):
            facts[person][attribute.name] = value
    return World(people, facts)


def texts() -> list[str]:
    """Every word and wording of the world, for the vocabulary."""
    lists = [*KINDS.values(), OBJECTS, PLACES, NUMBERS, build_world().people]
    phrases = [s for a in ATTRIBUTES.values() for s in (*a.statements, a.question or "")]
    return [*(word for words in lists for word in words), *phrases]
