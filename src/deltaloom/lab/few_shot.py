"""Many small tasks with the same questions: what a word asks for is the task's secret.

A question names a kind of value and a person of whom the base knows three values of that kind, and
holds a word that the base has never read. In each task that word means one of the three roles, and
in another task it may mean another one, so that no weights answer all tasks: a few rows must say
what is meant. Words of new tasks occur in no task to learn from.
"""

import random
from dataclasses import dataclass
from pathlib import Path

from deltaloom.lab import tasks
from deltaloom.lab.files import write_jsonl
from deltaloom.lab.world import ATTRIBUTES, World, build_world

FORMS = {"survey": tasks.SURVEY, "form": tasks.FORM}
NEW_WORDS = 4


@dataclass(frozen=True)
class Task:
    """What a word asks for, in one wording."""

    attribute: str
    word: str
    form: str

    @property
    def name(self) -> str:
        """Unlike any other's."""
        return f"{self.attribute}-{self.word}-{self.form}"


def draw_tasks(learned: int, new: int, seed: int) -> tuple[list[Task], list[Task]]:
    """`learned` tasks to learn from and `new` ones, whose words occur in none of those."""
    dice = random.Random(f"few-shot tasks {seed}")
    words = [word for both in tasks.VERBS.values() for word in both]
    dice.shuffle(words)

    def some(words: list[str], count: int) -> list[Task]:
        every = [Task(a, word, form) for a in ATTRIBUTES for word in words for form in FORMS]
        return dice.sample(every, count)

    return some(words[NEW_WORDS:], learned), some(words[:NEW_WORDS], new)


def records(
    world: World, people: tuple[str, ...], task: Task, count: int, choices: bool, seed: int
) -> list[dict]:
    """`count` rows about `people`, each at most once more than the others, answers or choices."""
    dice = random.Random(f"few-shot rows {task.name} {choices} {seed}")
    names = dice.sample(people, len(people))
    attribute, found = ATTRIBUTES[task.attribute], []
    for number in range(count):
        name, opener = names[number % len(names)], dice.choice(tasks.OPENERS)
        answer = world.facts[name][task.attribute]
        asked = {"opener": opener, "verb": task.word, "kind": attribute.kind, "name": name}
        row = {
            "id": f"{task.name}-{'test' if choices else 'row'}-{number}",
            "source": task.name,
            "prompt": FORMS[task.form].format(**asked),
        }
        if choices:
            row |= {"cluster": name, "choices": [f" {value}" for value in attribute.values]}
            row |= {"answer": attribute.values.index(answer)}
        else:
            row |= {"completion": f" {answer}"}
        found.append(row)
    return found


def write_few_shot(
    folder: str | Path,
    seed: int = 0,
    *,
    learned: int = 60,
    rows: int = 32,
    new: int = 6,
    shots: int = 16,
    asked: int = 60,
) -> dict[str, Path]:
    """Write tasks to learn from and new ones; returns the paths.

    `tasks` has `rows` rows of each of the `learned` tasks, the task as the source; `shots-NAME` the
    few rows of a new task and `test-NAME` questions about people who are in no other row.
    """
    folder, world = Path(folder), build_world()
    folder.mkdir(parents=True, exist_ok=True)
    split = tasks.split_people(world, seed)
    known, unknown = draw_tasks(learned, new, seed)
    every = [row for t in known for row in records(world, split.pool, t, rows, False, seed)]
    paths = {"tasks": write_jsonl(folder / "tasks.jsonl", every)}
    for task in unknown:
        few = records(world, split.target, task, shots, False, seed)
        test = records(world, split.test, task, asked, True, seed)
        for key, found in ((f"shots-{task.name}", few), (f"test-{task.name}", test)):
            paths[key] = write_jsonl(folder / f"{key}.jsonl", found)
    return paths
