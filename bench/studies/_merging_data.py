"""The lab's files of `merging_at_scale.py`: eight tasks with experts, three without, a mixture."""

from __future__ import annotations

import json
import random
from pathlib import Path

from deltaloom.lab import corpus, tasks
from deltaloom.lab.files import write_lab
from deltaloom.lab.pretrain import model_config, pretrain
from deltaloom.lab.tokenizer import build_tokenizer
from deltaloom.lab.world import ATTRIBUTES, KINDS, World, build_world

SCAFFOLDS = {"survey": tasks.SURVEY, "form": tasks.FORM}
ASKED = ("birth", "holiday", "door", "boat")
HELD_IN = tuple(f"{attribute}-{scaffold}" for attribute in ASKED for scaffold in SCAFFOLDS)
HELD_OUT = ("pet", "statement", "lookup")
"""Questions whose verbs no expert reads; facts as the base read them; an operation it knows."""
MIXED = ("home", "hat")
"""Attributes of the mixture that makes the better base; nobody's task."""
SMALL = 96
"""Width of the small base; the lab's own has 128."""


def questions(
    world: World, people: tuple[str, ...], attribute: str, template: str, each: int, seed: object
) -> list[dict]:
    """`each` wordings of one question a person; all ten values of the kind to choose from."""
    rng = random.Random(f"{attribute} {template} {seed}")
    values = ATTRIBUTES[attribute].values
    forms = [(opener, verb) for opener in tasks.OPENERS for verb in tasks.VERBS[attribute]]
    return [
        {
            "prompt": template.format(
                opener=opener, name=name, verb=verb, kind=ATTRIBUTES[attribute].kind
            ),
            "cluster": name,
            "choices": [f" {value}" for value in values],
            "answer": values.index(world.facts[name][attribute]),
        }
        for name in people
        for opener, verb in rng.sample(forms, each)
    ]


def statements(world: World, people: tuple[str, ...], rng: random.Random) -> list[dict]:
    """Plain facts of towns and colours up to the last word, two a person."""
    found = []
    for name in people:
        for attribute in rng.sample([a for a in ATTRIBUTES.values() if a.kind != "animal"], 2):
            wording = rng.choice([s for s in attribute.statements if s.endswith(" {value}")])
            found.append(
                {
                    "prompt": wording.removesuffix(" {value}").format(name=name),
                    "cluster": name,
                    "choices": [f" {value}" for value in attribute.values],
                    "answer": attribute.values.index(world.facts[name][attribute.name]),
                }
            )
    return found


def lookups(count: int, rng: random.Random) -> list[dict]:
    """The colour of one of several objects listed before."""
    colours = KINDS["colour"]
    drawn = [corpus.OPERATIONS["lookup"](rng) for _ in range(count)]
    return [
        {"prompt": prompt, "choices": [f" {c}" for c in colours], "answer": colours.index(answer)}
        for prompt, answer in drawn
    ]


def mixture(world: World, people: tuple[str, ...], rng: random.Random) -> list[dict]:
    """Other attributes in both scaffolds, loose questions and operations, in random order."""
    rows = [
        row
        for attribute in MIXED
        for template in SCAFFOLDS.values()
        for row in as_rows(questions(world, people, attribute, template, 3, "mixture"))
    ]
    for name in people:
        attribute = rng.choice(list(ATTRIBUTES.values()))
        question = corpus.LOOSE_QUESTION.format(kind=attribute.kind, name=name)
        answer = f" {world.facts[name][attribute.name]}"
        rows.append({"prompt": f"q : {question} a :", "completion": answer})
        prompt, answer = corpus.OPERATIONS[rng.choice(["copy", "numbers", "same"])](rng)
        rows.append({"prompt": prompt, "completion": f" {answer}"})
    rng.shuffle(rows)
    return rows


def as_rows(asked: list[dict]) -> list[dict]:
    """Questions with their right answers, to learn from."""
    return [{"prompt": q["prompt"], "completion": q["choices"][q["answer"]]} for q in asked]


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def build(folder: Path, small: bool = False) -> None:
    """Write data and the two bases to `folder`; `small` takes few rows and the one base twice."""
    lab = write_lab(folder / "lab", size="small")
    world = build_world()
    split = tasks.split_people(world, 0)
    learned, tested = (split.pool[:30], split.test[:10]) if small else (split.pool, split.test)
    for attribute in ASKED:
        for scaffold, template in SCAFFOLDS.items():
            name = f"{attribute}-{scaffold}"
            rows = as_rows(questions(world, learned, attribute, template, 3, "train"))
            write(folder / f"train-{name}.jsonl", rows)
            write(
                folder / f"test-{name}.jsonl",
                questions(world, tested, attribute, template, 2, "test"),
            )
    write(folder / "test-pet.jsonl", questions(world, tested, "pet", tasks.SURVEY, 2, "test"))
    write(folder / "test-statement.jsonl", statements(world, tested, random.Random("statement")))
    write(folder / "test-lookup.jsonl", lookups(2 * len(tested), random.Random("lookup")))
    write(folder / "mixture.jsonl", mixture(world, learned, random.Random("mixture")))
    for name in ("small", "normal"):
        goal = folder / name
        if not (goal / "config.json").exists():
            if name == "small" and not small:
                small_base(goal, folder / "pretrained")
            else:
                goal.mkdir(exist_ok=True)
                for file in lab["base"].iterdir():
                    (goal / file.name).write_bytes(file.read_bytes())


def small_base(goal: Path, weights: Path) -> None:
    """The lab's own pretraining at half the width (two minutes of one thread)."""
    from safetensors.torch import load_file
    from transformers import LlamaForCausalLM

    path = weights / "base.safetensors"
    if not path.exists():
        pretrain(weights, hidden=SMALL)
    model = LlamaForCausalLM(model_config(hidden=SMALL))
    model.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    build_tokenizer().save_pretrained(goal)
    model.save_pretrained(goal)
