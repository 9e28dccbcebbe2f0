"""Rows for `main_job.py`: ten real sources in instruction form, split into parts by seed.

Test and validation parts are the same for every seed, so that seeds are compared on the same
items; the target rows and the pool are drawn anew for each seed from what is left. Rows that
answer one prompt (one fable told by several models) stay on one side of every border.
"""

from __future__ import annotations

import csv
import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path

PROMPT, RESPONSE = 200, 280
"""Characters of a prompt and of a response at most; about 160 tokens of the base's tokenizer."""
LABELS = ("description", "entity", "abbreviation", "person", "location", "number")
"""TREC's question types, in the order of its numbers."""

Row = dict[str, object]


def lines(path: Path, encoding: str = "utf-8") -> list[str]:
    """The lines of a file that hold something; other line ends than LF are text."""
    return [line for line in path.read_text(encoding).split("\n") if line.strip()]


def cut(text: str, limit: int) -> str:
    """`text` on one paragraph, cut after a sentence where possible, else after a word."""
    text = " ".join(text.split())
    if len(text) <= limit:
        return text
    head = text[: limit + 1]
    ends = [match.end() for match in re.finditer(r"[.!?][\"')]?(?= )", head)]
    return head[: ends[-1]] if ends and ends[-1] > limit // 2 else head.rpartition(" ")[0]


def row(source: str, prompt: str, response: str, about: str = "") -> Row:
    """One row; `about` names what must not be on both sides of a border."""
    prompt = cut(prompt, PROMPT)
    return {
        "source": source,
        "prompt": prompt + "\nAnswer:",
        "completion": " " + cut(response, RESPONSE),
        "about": about or prompt,
    }


def fables(root: Path) -> Iterator[Row]:
    """Structured prompt -> fable, told by ten or so language models."""
    for file in sorted((root / "fables_en").rglob("*.jsonl")):
        for line in lines(file):
            found = json.loads(line)
            points = re.findall(r"- ([A-Z][\w ]+: [^\n]+)", str(found.get("prompt", "")))
            if len(points) >= 5 and found.get("fable"):
                asked = "Write a fable. " + ". ".join(points[:5]) + "."
                yield row("fables", asked, found["fable"], "fable " + asked)


def tales(root: Path) -> Iterator[Row]:
    """Instruction -> children's tale."""
    for file in sorted((root / "snakes_stories").glob("generated-*.md")):
        text = file.read_text(encoding="utf-8")
        for asked, told in re.findall(r"([^\n<>]+)<start>(.*?)<end>", text, re.DOTALL):
            yield row("tales", asked, told)


def tinystories(root: Path) -> Iterator[Row]:
    """Opening -> continuation."""
    stories = json.loads((root / "tinystories_1000/tinystories_1000.json").read_text("utf-8"))
    for story in stories:
        opening, _, rest = story.partition("\n\n")
        if rest.strip():
            yield row("tinystories", "Continue the story. " + opening, rest)


def natural(root: Path) -> Iterator[Row]:
    """Natural Instructions v1: 29 subtasks, at most 200 rows of each."""
    for file in sorted((root / "natural_instructions_v1").glob("*.json")):
        task = json.loads(file.read_text("utf-8"))
        asked = cut(str(task["Definition"]), PROMPT // 2)
        for one in task["Instances"][:200]:
            question = f"{asked} {cut(one['input'], PROMPT // 2 - 1)}"
            yield row("natural_instructions", question, one["output"][0], one["input"])


def reasoning(root: Path) -> Iterator[Row]:
    """FLAN's chain-of-thought sets but its GSM8K, at most 800 rows of each."""
    for file in sorted((root / "flan_v2_cot").glob("*.tsv")):
        if file.name != "gsm8k_train.tsv":
            for line in lines(file)[:800]:
                question, answer, reason = line.replace("\\n", " ").split("\t")[:3]
                yield row("flan_cot", question, f"{reason} So the answer is {answer}.")


def gsm8k(root: Path) -> Iterator[Row]:
    """Grade-school arithmetic, worked out."""
    for line in lines(root / "gsm8k/train.jsonl"):
        found = json.loads(line)
        yield row("gsm8k", found["question"], re.sub(r"<<.*?>>", "", found["answer"]))


def self_instruct(root: Path) -> Iterator[Row]:
    """Tasks written by people."""
    for name in ("data/seed_tasks.jsonl", "human_eval/user_oriented_instructions.jsonl"):
        for line in lines(root / "self_instruct" / name):
            found = json.loads(line)
            one = found["instances"][0]
            if one["output"].strip():
                yield row("self_instruct", f"{found['instruction']} {one['input']}", one["output"])


def trec(root: Path, part: str = "train") -> Iterator[Row]:
    """Question -> its type, with the six types to choose from."""
    for line in lines(root / f"classification_sentiment/TREC.{part}.all", "latin-1"):
        label, _, question = line.partition(" ")
        found = row("trec", "What type is asked for? " + question, LABELS[int(label)])
        yield {**found, "choices": [" " + name for name in LABELS], "answer": int(label)}


def sentiment(root: Path) -> Iterator[Row]:
    """SST-2: sentence -> good or bad."""
    for line in lines(root / "classification_sentiment/stsa.binary.train"):
        label, _, sentence = line.partition(" ")
        yield row("sst2", "Is this review good or bad? " + sentence, ("bad", "good")[int(label)])


def banking(root: Path) -> Iterator[Row]:
    """Customer's question -> one of 77 intents."""
    with open(root / "banking77/train.csv", encoding="utf-8") as file:
        for found in csv.DictReader(file):
            intent = found["category"].replace("_", " ").lower()
            yield row("banking77", "What does the customer want? " + found["text"], intent)


SOURCES: dict[str, tuple[Callable[[Path], Iterator[Row]], float]] = {
    "fables": (fables, 0.06),
    "tales": (tales, 0.10),
    "tinystories": (tinystories, 0.10),
    "natural_instructions": (natural, 0.22),
    "flan_cot": (reasoning, 0.20),
    "gsm8k": (gsm8k, 0.08),
    "self_instruct": (self_instruct, 0.06),
    "trec": (trec, 0.06),
    "sst2": (sentiment, 0.06),
    "banking77": (banking, 0.06),
}
"""Source -> its rows, and its share of the pool."""
TARGETS = ("fables", "trec")


def read_sources(assets: Path) -> dict[str, list[Row]]:
    """Distinct rows of every source."""
    found = {}
    for name, (read, _) in SOURCES.items():
        distinct = {(one["prompt"], one["completion"]): one for one in read(assets / "data")}
        found[name] = list(distinct.values())
    return found


def part_of(
    rows: list[Row], count: int, rng: random.Random, each: int = 5
) -> tuple[list[Row], list[Row]]:
    """Groups of rows about one thing, `each` of a group at most, until there are `count`; and the
    rows of all other groups."""
    groups: dict[object, list[Row]] = {}
    for one in rows:
        groups.setdefault(one["about"], []).append(one)
    names = list(groups)
    rng.shuffle(names)
    taken: list[Row] = []
    while names and len(taken) < count:
        taken += groups[names.pop()][:each]
    return taken[:count], [one for name in names for one in groups[name]]


def write(path: Path, rows: list[Row], grouped: bool = False, question: bool = False) -> None:
    """JSONL. `grouped` keeps what rows are about as their cluster, `question` their choices."""
    found = []
    for one in rows:
        kept = {key: one[key] for key in ("source", "prompt", "completion")}
        if question and "choices" in one:
            kept.update(choices=one["choices"], answer=one["answer"])
        if grouped:
            kept["group"] = one["about"]
        found.append(json.dumps(kept, ensure_ascii=False) + "\n")
    path.write_text("".join(found), encoding="utf-8")


def build(
    assets: Path, sources: dict[str, list[Row]], folder: Path, seed: int, size: dict[str, int]
) -> None:
    """Write pool, targets, validation and test of one seed; the last two ignore the seed."""
    folder.mkdir(parents=True, exist_ok=True)
    pool: list[Row] = []
    for name, (_, share) in SOURCES.items():
        fixed, own = random.Random(f"parts {name}"), random.Random(f"{seed} {name}")
        rows = list(sources[name])
        if name in TARGETS:
            if name == "trec":
                test = list(trec(assets / "data", "test"))
                fixed.shuffle(test)
                test, asked = test[: size["test"]], {one["about"] for one in test}
                rows = [one for one in rows if one["about"] not in asked]
            else:
                test, rows = part_of(rows, size["test"], fixed)
            validation, rows = part_of(rows, size["validation"], fixed)
            target, rows = part_of(rows, size["target"], own)
            write(folder / f"target_{name}.jsonl", target)
            write(folder / f"valid_{name}.jsonl", validation, True, True)
            write(folder / f"test_{name}.jsonl", test, True, True)
        own.shuffle(rows)
        pool += rows[: round(share * size["pool"])]
    random.Random(f"{seed} order").shuffle(pool)
    write(folder / "pool.jsonl", pool)
