"""Scenes of k concepts: sampled, bound into a graph, put into words and into yes/no questions.

The sampler is ConceptMix's (Wu et al. 2024, section 3): one object to begin with; each of k draws
is another object with probability 0.25, else a concept of one of the seven other categories, drawn
again when its category would occur more often than there are objects. Attributes are bound to a
random object that lacks one; a style is the whole image's. Ours: objects are all different, there
is one style at most (the released code lets a second one through and asks for both), and a relation
in a scene of one object adds a second that nothing is asked about.
"""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deltaloom.core.errors import InputError

CATEGORIES = ("object", "color", "number", "shape", "size", "texture", "style", "spatial")
ATTRIBUTES = ("color", "number", "shape", "size", "texture")
OBJECT_SHARE = 0.25
"""Probability that a draw is another object (ConceptMix's `object_prob`)."""
NUMBERS = {"2": "two", "3": "three", "4": "four"}
PATIENCE = 200
"""Scenes drawn, and draws for one, after which a vocabulary is taken to be too small."""

Vocabulary = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Concept:
    """One thing that is asked for."""

    category: str
    value: str
    about: tuple[str, ...] = ()
    """The nouns it is bound to: one, two for a relation, none for a style."""

    def question(self) -> str:
        """The yes/no question; yes is what the scene wants."""
        noun = self.about[0] if self.about else ""
        return {
            "object": f"Does the image contain {_a(self.value)}?",
            "color": f"Is the {noun} {self.value}?",
            "number": f"Are there exactly {NUMBERS.get(self.value, self.value)} {plural(noun)}?",
            "shape": f"Does the {noun} have the shape of {_a(self.value)}?",
            "size": f"Is the {noun} {self.value}?",
            "texture": f"Does the {noun} have a {self.value} texture?",
            "style": f"Is the image in {self.value} style?",
            "spatial": f"Is the {noun} {self.value} the {self.about[-1] if self.about else ''}?",
        }[self.category]


@dataclass(frozen=True)
class Thing:
    """One kind of object in a scene."""

    noun: str
    attributes: Mapping[str, str] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """How many of it there are."""
        return int(self.attributes.get("number", 1))


@dataclass(frozen=True)
class Scene:
    """What an image is to show."""

    id: str
    things: tuple[Thing, ...]
    style: str | None
    relations: tuple[tuple[str, str, str], ...]
    """Noun, relation, noun."""
    concepts: tuple[Concept, ...]
    """The k concepts and the first object, each asked about once."""

    def graph(self) -> dict[str, Any]:
        """The scene as JSON."""
        return {
            "style": self.style,
            "objects": [{"noun": one.noun, **one.attributes} for one in self.things],
            "relations": [list(one) for one in self.relations],
        }

    def prompt(self) -> str:
        """The scene in words, by rule."""
        listed = [_phrase(one) for one in self.things]
        text = ", ".join(listed[:-1]) + f" and {listed[-1]}" if len(listed) > 1 else listed[0]
        start = (
            f"An image in {self.style} style of {text}." if self.style else f"An image of {text}."
        )
        counts = {one.noun: one.count for one in self.things}
        rest = [
            f"The {plural(a) if counts[a] > 1 else a} {'are' if counts[a] > 1 else 'is'} "
            f"{relation} the {plural(b) if counts[b] > 1 else b}."
            for a, relation, b in self.relations
        ]
        return " ".join([start, *rest])


def vocabulary(name: str) -> dict[str, list[str]]:
    """The package's `drawn` or `everyday` concepts, or those of a JSON file of yours.

    Raises InputError for a file that is not an object of eight lists of words.
    """
    shipped = Path(__file__).parent / "data" / "concepts" / f"{name}.json"
    path = shipped if shipped.exists() else Path(name).expanduser()
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{name}: neither drawn, everyday nor a file of concepts") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a JSON file of concepts ({error})") from None
    if not isinstance(found, dict):
        raise InputError(f"{path}: must be an object with a list for each category")
    for category in CATEGORIES:
        words = found.get(category)
        if (
            not isinstance(words, list)
            or len(words) < 2
            or not all(isinstance(word, str) and word.strip() for word in words)
            or len(set(words)) < len(words)
        ):
            raise InputError(f"{path}: {category!r} must be a list of two or more different words")
    unknown = sorted(found.keys() - set(CATEGORIES))
    if unknown:
        raise InputError(f"{path}: {unknown[0]!r} is no category ({', '.join(CATEGORIES)})")
    if not all(word.isdigit() and int(word) > 1 for word in found["number"]):
        raise InputError(f"{path}: 'number' must be whole numbers above 1, as texts")
    return found


def sample_scene(
    words: Vocabulary,
    k: int,
    seed: int,
    index: int,
    possible: Callable[[Scene], bool] = lambda scene: True,
) -> Scene:
    """The scene of this number among those of `k` concepts, the first that is `possible`.

    Raises InputError for a vocabulary in which none is.
    """
    for attempt in range(PATIENCE):
        rng = random.Random(f"{seed} {k} {index} {attempt}")
        drawn = _drawn(words, k, rng)
        scene = None if drawn is None else _bound(words, rng, *drawn, f"k{k}-{index:04d}")
        if scene is not None and possible(scene):
            return scene
    raise InputError(f"k = {k}: the vocabulary has no scene of so many concepts")


def _drawn(words: Vocabulary, k: int, rng: random.Random) -> tuple[list[str], Counter[str]] | None:
    """Nouns, and how many concepts of each other category; None where they do not fit."""
    nouns = [rng.choice(words["object"])]
    categories: Counter[str] = Counter()
    others = [name for name in CATEGORIES if name != "object"]
    for _ in range(PATIENCE + k):
        if len(nouns) - 1 + categories.total() == k:
            return nouns, categories
        if rng.random() < OBJECT_SHARE:
            free = [noun for noun in words["object"] if noun not in nouns]
            nouns += [rng.choice(free)] if free else []
            continue
        name = rng.choice(others)
        partners = max(len(nouns), 2)  # a relation may add one
        most = {"style": 1, "spatial": min(len(nouns), partners * (partners - 1) // 2)}
        if categories[name] < most.get(name, len(nouns)):
            categories[name] += 1
    return None


def _bound(
    words: Vocabulary, rng: random.Random, nouns: list[str], categories: Counter[str], name: str
) -> Scene:
    """Attributes, relations and the style given to objects."""
    attributes: dict[str, dict[str, str]] = {noun: {} for noun in nouns}
    concepts = [Concept("object", noun) for noun in nouns]
    for category in ATTRIBUTES:
        for noun in rng.sample(nouns, categories[category]):
            value = rng.choice(words[category])
            attributes[noun][category] = value
            concepts.append(Concept(category, value, (noun,)))
    style = rng.choice(words["style"]) if categories["style"] else None
    if style is not None:
        concepts.append(Concept("style", style))
    if categories["spatial"] and len(nouns) == 1:
        extra = rng.choice([noun for noun in words["object"] if noun not in nouns])
        attributes[extra] = {}
    pairs = list(itertools.combinations(attributes, 2))
    relations = []
    for pair in rng.sample(pairs, categories["spatial"]):
        a, b = rng.sample(pair, 2)
        relations.append((a, rng.choice(words["spatial"]), b))
    concepts += [Concept("spatial", relation, (a, b)) for a, relation, b in relations]
    things = tuple(Thing(noun, given) for noun, given in attributes.items())
    return Scene(name, things, style, tuple(relations), tuple(concepts))


def plural(noun: str) -> str:
    """English plural by rule, with the exceptions among the shipped words."""
    known = {"man": "men", "woman": "women", "child": "children", "cactus": "cacti"}
    if noun in known:
        return known[noun]
    if noun.endswith(("s", "x", "ch", "sh")):
        return f"{noun}es"
    if noun.endswith("y") and noun[-2:-1] not in "aeiou":
        return f"{noun[:-1]}ies"
    return f"{noun}s"


def _a(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _phrase(one: Thing) -> str:
    """`three tiny red glass houses in the shape of a heart`."""
    given = one.attributes
    words = [given[name] for name in ("size", "color", "texture") if name in given]
    many = one.count > 1
    head = " ".join([*words, plural(one.noun) if many else one.noun])
    text = f"{NUMBERS.get(given['number'], given['number'])} {head}" if many else _a(head)
    return f"{text} in the shape of {_a(given['shape'])}" if "shape" in given else text
