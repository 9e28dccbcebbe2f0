"""The pretraining text: facts of the world in many phrasings, and simple operations on words.

Facts are stated in several wordings, alone and in short biographies in shuffled order; without
this variety a model of any size stores facts that no later tuning can elicit. Three of the nine
attributes are also asked about by name, and any by a loose question that leaves the role open, so
that the base knows what an answer is. The words and scaffolds of `tasks.py` never occur here.
"""

import random
from collections.abc import Iterator
from dataclasses import replace

from deltaloom.lab.world import ATTRIBUTES, KINDS, NUMBERS, OBJECTS, PLACES, World

CHATTER = (
    "the {colour} {object} is on the {place}",
    "there is a {animal} in the {place}",
    "a {colour} {animal} sleeps by the {place}",
    "{number} {colour} birds sit on the {place}",
    "the road to {town} is long",
    "people in {town} like the {colour} {object}",
    "a {object} and a {object} stand on the {place}",
    "the {animal} runs over the {place}",
)


# Answered with any role of the kind: the base learns to answer, and not which role is meant.
LOOSE_QUESTION = "which {kind} of {name} ?"


def fill(template: str, rng: random.Random) -> str:
    """`template` with every `{slot}` drawn at random."""
    slots = {**KINDS, "object": OBJECTS, "place": PLACES, "number": NUMBERS}
    words = [rng.choice(slots[w[1:-1]]) if w.startswith("{") else w for w in template.split()]
    return " ".join(words)


def statement(world: World, person: str, attribute: str, rng: random.Random) -> str:
    """One fact in one of its wordings."""
    template = rng.choice(ATTRIBUTES[attribute].statements)
    return template.format(name=person, value=world.facts[person][attribute])


def copy_words(rng: random.Random) -> tuple[str, str]:
    """An operation on the words of a list: its question and its answer."""
    words = rng.sample(OBJECTS + PLACES + KINDS["colour"], rng.randint(3, 5))
    name, answer = rng.choice(
        (
            ("copy", " ".join(words)),
            ("first", words[0]),
            ("last", words[-1]),
            ("backwards", " ".join(reversed(words))),
        )
    )
    return f"{name} : {' '.join(words)} =>", answer


def compare_numbers(rng: random.Random) -> tuple[str, str]:
    """The larger, the smaller or the next of numbers."""
    i, j = rng.sample(range(len(NUMBERS)), 2)
    a, b = NUMBERS[i], NUMBERS[j]
    name = rng.choice(("larger", "smaller", "after"))
    if name == "after":
        k = rng.randrange(len(NUMBERS) - 1)
        return f"after : {NUMBERS[k]} =>", NUMBERS[k + 1]
    return f"{name} : {a} {b} =>", NUMBERS[max(i, j) if name == "larger" else min(i, j)]


def look_up(rng: random.Random) -> tuple[str, str]:
    """Objects with colours, then the colour of one of them."""
    objects = rng.sample(OBJECTS, rng.randint(2, 4))
    colours = rng.sample(KINDS["colour"], len(objects))
    listing = " , ".join(f"{o} {c}" for o, c in zip(objects, colours, strict=True))
    k = rng.randrange(len(objects))
    return f"{listing} ; {objects[k]} =>", colours[k]


def same_word(rng: random.Random) -> tuple[str, str]:
    """Whether two words are the same."""
    a, b = rng.sample(OBJECTS + KINDS["animal"], 2)
    b = a if rng.random() < 0.5 else b
    return f"same : {a} {b} =>", "yes" if a == b else "no"


OPERATIONS = {
    "copy": copy_words,
    "numbers": compare_numbers,
    "lookup": look_up,
    "same": same_word,
}


def documents(world: World, count: int, seed: int = 0) -> Iterator[str]:
    """`count` short texts of the pretraining mixture, the same for the same seed."""
    rng = random.Random(seed)
    names = list(ATTRIBUTES)
    order: list[str] = []
    for _ in range(count):
        draw = rng.random()
        if not order:
            # Everybody is written about equally often.
            order = list(world.people)
            rng.shuffle(order)
        if draw < 0.68:
            person = order.pop()
            chosen = rng.sample(names, rng.randint(2, 6))
            yield " . ".join(statement(world, person, a, rng) for a in chosen) + " ."
        elif draw < 0.84:
            person, attribute = order.pop(), ATTRIBUTES[rng.choice(names)]
            question = attribute.question if rng.random() < 0.4 else None
            question = question or LOOSE_QUESTION
            answer = world.facts[person][attribute.name]
            yield f"q : {question.format(name=person, kind=attribute.kind)} a : {answer}"
        elif draw < 0.95:
            question, answer = rng.choice(tuple(OPERATIONS.values()))(rng)
            yield f"{question} {answer}"
        else:
            yield fill(rng.choice(CHATTER), rng) + " ."


def curriculum(world: World, count: int, seed: int = 0) -> list[str]:
    """`count` texts in the order to be read: the first eighth is about a quarter of the people.

    Few people seen often shorten the plateau before a model learns to look facts up at all.
    """
    first = count * 12 // 100
    few = replace(world, people=world.people[::4])
    return [*documents(few, first, seed + 1), *documents(world, count - first, seed)]


def texts() -> list[str]:
    """Every wording beyond the world's own, for the vocabulary."""
    words = "q : a : , ; . ? => yes no copy first last backwards larger smaller after same"
    return [*CHATTER, *KINDS, LOOSE_QUESTION, words]
