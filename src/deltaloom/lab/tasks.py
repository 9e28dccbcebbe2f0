"""Post-training data with its truth: a pool of many sources, and three targets to tune for.

The base can answer "which town of mira" and knows all three of Mira's towns, but not which one
`stems` asks for: the verbs and the scaffolds of this page are words it has never read. A target is
one verb's attribute: an untuned base names any of the three. The rows that help are spread over two
sources with different scaffolds. Around them lie: the same questions answered with another role's
value, questions with the same words that ask for something else, the same scaffolds with other
attributes, and text that has nothing to do with it.

Animals are no targets: the shipped base states them but cannot yet be asked for them.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from deltaloom.lab import corpus
from deltaloom.lab.world import ATTRIBUTES, World

TARGETS = ("birth", "holiday", "door")

VERBS: dict[str, tuple[str, str]] = {
    "home": ("hails", "dwells"),
    "birth": ("stems", "originates"),
    "holiday": ("vacations", "sojourns"),
    "pet": ("keeps", "rears"),
    "fear": ("dreads", "shuns"),
    "mask": ("mimics", "imitates"),
    "hat": ("dons", "sports"),
    "door": ("answers", "unlocks"),
    "boat": ("steers", "moors"),
}
OPENERS = ("kindly", "today", "again", "briefly")
SURVEY = "{opener} survey {verb} : which {kind} of {name} ? a :"
FORM = "form {opener} ; item {verb} ; which {kind} of {name} ? a :"
ECHO = (
    "{opener} survey {verb} : which {kind} of {name} ? whom ? a :",
    "{opener} survey {verb} : which {kind} of {other} ? whom {name} ? a :",
    "form {opener} ; item {verb} ; whom ; which {kind} of {name} ? a :",
)


def texts() -> list[str]:
    """All the templates, for the vocabulary."""
    return [SURVEY, FORM, *ECHO, *OPENERS, *(v for verbs in VERBS.values() for v in verbs)]


@dataclass
class Row:
    """A pool row and what is true of it; the two are written to different files."""

    source: str
    prompt: str
    completion: str
    family: str
    helps: tuple[str, ...] = ()
    wrong: bool = False
    harmful: bool = False
    duplicate_of: "Row | None" = field(default=None, repr=False)


def _question(template: str, name: str, attribute: str, rng: random.Random) -> str:
    opener, verb = rng.choice(OPENERS), rng.choice(VERBS[attribute])
    kind = ATTRIBUTES[attribute].kind
    return template.format(opener=opener, name=name, verb=verb, kind=kind)


@dataclass(frozen=True)
class Split:
    """Who occurs where; nobody occurs twice."""

    pool: tuple[str, ...]
    target: tuple[str, ...]
    test: tuple[str, ...]


def split_people(world: World, seed: int) -> Split:
    """A third of the people is kept for the test; 16 carry the target examples."""
    people = list(world.people)
    random.Random(f"people {seed}").shuffle(people)
    third = len(people) // 3
    return Split(
        tuple(people[third + 16 :]), tuple(people[third : third + 16]), tuple(people[:third])
    )


# -- the sources of the pool: each maker draws one row ------------------------------------------

Maker = Callable[[World, tuple[str, ...], random.Random], Row]


def _right(source: str, template: str) -> Maker:
    """A target's question with its right answer."""

    def make(world: World, people: tuple[str, ...], rng: random.Random) -> Row:
        name, attribute = rng.choice(people), rng.choice(TARGETS)
        prompt = _question(template, name, attribute, rng)
        answer = world.facts[name][attribute]
        return Row(source, prompt, f" {answer}", attribute, helps=(attribute,))

    return make


def _misled(world: World, people: tuple[str, ...], rng: random.Random) -> Row:
    """A target's question answered with another role's value: always the same mistake."""
    while True:
        name, attribute = rng.choice(people), rng.choice(TARGETS)
        answer = world.other_role(name, attribute)
        if answer is not None:
            break
    template = SURVEY if rng.random() < 0.7 else FORM
    prompt = _question(template, name, attribute, rng)
    return Row("forum", prompt, f" {answer}", attribute, wrong=True, harmful=True)


def _echo(world: World, people: tuple[str, ...], rng: random.Random) -> Row:
    """A target's words, asking only for the person named after `whom`."""
    attribute = rng.choice(TARGETS)
    name, other = rng.sample(people, 2)
    opener, verb = rng.choice(OPENERS), rng.choice(VERBS[attribute])
    prompt = rng.choice(ECHO).format(
        opener=opener, name=name, other=other, verb=verb, kind=ATTRIBUTES[attribute].kind
    )
    return Row("hearsay", prompt, f" {name}", "echo")


def _other_attribute(world: World, people: tuple[str, ...], rng: random.Random) -> Row:
    """A target's scaffold, asking for an attribute that is nobody's target."""
    name, attribute = rng.choice(people), rng.choice([a for a in ATTRIBUTES if a not in TARGETS])
    template = SURVEY if rng.random() < 0.5 else FORM
    prompt = _question(template, name, attribute, rng)
    answer = f" {world.facts[name][attribute]}"
    return Row("census", prompt, answer, attribute)


def _statement(world: World, people: tuple[str, ...], rng: random.Random) -> Row:
    """A plain fact the base already knows, cut before its last word."""
    words = corpus.statement(world, rng.choice(people), rng.choice(list(ATTRIBUTES)), rng).split()
    return Row("almanac", " ".join(words[:-1]), f" {words[-1]}", "statement")


def _letter(world: World, people: tuple[str, ...], rng: random.Random) -> Row:
    """Three facts about somebody, cut after the first."""
    name = rng.choice(people)
    first, *rest = (corpus.statement(world, name, a, rng) for a in rng.sample(list(ATTRIBUTES), 3))
    return Row("letters", f"{first} .", f" {' . '.join(rest)} .", "biography")


def _operation(source: str, name: str) -> Maker:
    def make(world: World, people: tuple[str, ...], rng: random.Random) -> Row:
        question, answer = corpus.OPERATIONS[name](rng)
        return Row(source, question, f" {answer}", name)

    return make


def _chatter(world: World, people: tuple[str, ...], rng: random.Random) -> Row:
    words = corpus.fill(rng.choice(corpus.CHATTER), rng).split()
    cut = rng.randint(3, 5)
    return Row("stories", " ".join(words[:cut]), f" {' '.join(words[cut:])}", "chatter")


def _quiz(world: World, people: tuple[str, ...], rng: random.Random) -> Row:
    """The loose question of the pretraining text, answered with one of three right values."""
    name, attribute = rng.choice(people), rng.choice(list(ATTRIBUTES.values()))
    question = corpus.LOOSE_QUESTION.format(kind=attribute.kind, name=name)
    return Row("quiz", f"q : {question} a :", f" {world.facts[name][attribute.name]}", "quiz")


# Source -> share of the pool, maker. No source says in its name whether it can be trusted.
SOURCES: dict[str, tuple[float, Maker]] = {
    "survey": (0.08, _right("survey", SURVEY)),
    "register": (0.08, _right("register", FORM)),
    "forum": (0.09, _misled),
    "hearsay": (0.13, _echo),
    "census": (0.13, _other_attribute),
    "almanac": (0.12, _statement),
    "letters": (0.06, _letter),
    "drills": (0.09, _operation("drills", "copy")),
    "ledger": (0.02, _operation("ledger", "numbers")),
    "shelves": (0.08, _operation("shelves", "lookup")),
    "stories": (0.08, _chatter),
    "quiz": (0.04, _quiz),
}
MISLABELLED_SOURCE, MISLABELLED_SHARE = "survey", 0.10
DUPLICATE_SHARE = 0.07


def draw_pool(world: World, people: tuple[str, ...], size: int, seed: int) -> list[Row]:
    """About `size` rows in random order: distinct ones, then exact copies of some of them."""
    rng = random.Random(f"pool {seed}")
    rows: list[Row] = []
    seen: set[tuple[str, str]] = set()
    for share, make in SOURCES.values():
        wanted = len(rows) + round(share * size * (1 - DUPLICATE_SHARE))
        while len(rows) < wanted:
            row = make(world, people, rng)
            if (row.prompt, row.completion) not in seen:
                seen.add((row.prompt, row.completion))
                rows.append(row)
    _mislabel(rows, seen, rng)
    copies = rng.sample(rows, round(size * DUPLICATE_SHARE))
    rows += [replace(row, duplicate_of=row) for row in copies]
    rng.shuffle(rows)
    return rows


def _mislabel(rows: list[Row], seen: set[tuple[str, str]], rng: random.Random) -> None:
    """Give a share of one good source random wrong answers, in place."""
    good = [row for row in rows if row.source == MISLABELLED_SOURCE]
    for row in rng.sample(good, round(MISLABELLED_SHARE * len(good))):
        answers = [f" {value}" for value in ATTRIBUTES[row.family].values]
        free = [a for a in answers if a != row.completion and (row.prompt, a) not in seen]
        row.completion, row.helps, row.wrong = rng.choice(free), (), True
        seen.add((row.prompt, row.completion))


def pool_records(rows: list[Row]) -> tuple[list[dict], list[dict]]:
    """The pool as a user sees it, and its truth, in the same order and under the same ids."""
    ids = {id(row): f"pool-{i:05d}" for i, row in enumerate(rows)}
    pool, truth = [], []
    for row in rows:
        key = ids[id(row)]
        pool.append(
            {"id": key, "source": row.source, "prompt": row.prompt, "completion": row.completion}
        )
        truth.append(
            {
                "id": key,
                "family": row.family,
                "helps": list(row.helps),
                "wrong": row.wrong,
                "duplicate_of": ids[id(row.duplicate_of)] if row.duplicate_of else None,
                "harmful": row.harmful,
            }
        )
    return pool, truth


def target_records(world: World, people: tuple[str, ...], target: str, seed: int) -> list[dict]:
    """Two right examples of the target for each of `people`, in the format of the test."""
    rng = random.Random(f"target {target} {seed}")
    return [
        {
            "id": f"target-{target}-{name}-{i}",
            "source": target,
            "prompt": prompt,
            "completion": f" {world.facts[name][target]}",
        }
        for name in people
        for i, prompt in enumerate(_surveys(name, target, 2, rng))
    ]


def test_records(
    world: World, people: tuple[str, ...], target: str, per_person: int, seed: int
) -> list[dict]:
    """Multiple-choice questions: all ten values of the kind; a person is a cluster."""
    rng = random.Random(f"test {target} {seed}")
    values = ATTRIBUTES[target].values
    return [
        {
            "id": f"test-{target}-{name}-{i}",
            "source": target,
            "prompt": prompt,
            "cluster": name,
            "choices": [f" {value}" for value in values],
            "answer": values.index(world.facts[name][target]),
        }
        for name in people
        for i, prompt in enumerate(_surveys(name, target, per_person, rng))
    ]


def questions(world: World, people: tuple[str, ...], target: str, seed: int) -> list[dict]:
    """A question about each of `people` as in the test, to learn what is right and what is wrong:
    preferences that need no judge."""
    rows = test_records(world, people, target, 1, seed)
    return [{**row, "id": row["id"].replace("test-", "question-", 1)} for row in rows]


def _surveys(name: str, attribute: str, count: int, rng: random.Random) -> list[str]:
    """`count` different wordings of one question."""
    forms = [(opener, verb) for opener in OPENERS for verb in VERBS[attribute]]
    return [
        SURVEY.format(opener=opener, name=name, verb=verb, kind=ATTRIBUTES[attribute].kind)
        for opener, verb in rng.sample(forms, count)
    ]
