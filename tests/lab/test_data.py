"""The data files and their truth, checked against the world's table and not the makers."""

import json
import subprocess
import sys
from collections import Counter

import pytest

from deltaloom.lab import TARGETS, tasks
from deltaloom.lab.files import write_jsonl
from deltaloom.lab.world import ATTRIBUTES, KINDS

# Written out again on purpose: the test must not lean on the table it tests.
ASKS = {
    "birth": {"stems", "originates"},
    "holiday": {"vacations", "sojourns"},
    "door": {"answers", "unlocks"},
}
MISTAKES = {"birth": "home", "holiday": "home", "door": "hat"}


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def full(world):
    split = tasks.split_people(world, 1)
    rows = tasks.draw_pool(world, split.pool, 5500, 1)
    return split, *tasks.pool_records(rows)


def test_import_is_light():
    heavy = "[m for m in ('torch', 'transformers') if m in sys.modules]"
    code = f"import sys, deltaloom.lab; print({heavy})"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_schema_and_no_leak(paths):
    pool, truth = read(paths["pool"]), read(paths["truth"])
    assert [r["id"] for r in pool] == [r["id"] for r in truth]
    assert len({r["id"] for r in pool}) == len(pool)
    assert {k for r in pool for k in r} == {"id", "source", "prompt", "completion"}
    assert all(r["completion"].startswith(" ") and not r["prompt"].endswith(" ") for r in pool)
    for name in TARGETS:
        assert len(read(paths[f"target-{name}"])) == 32
        for row in read(paths[f"test-{name}"]):
            assert set(row) == {"id", "source", "cluster", "prompt", "choices", "answer"}
            assert len(set(row["choices"])) == 10


def test_questions_are_about_people_of_the_pool(paths, world):
    rows, tests = read(paths["questions"]), [read(paths[f"test-{name}"]) for name in TARGETS]
    assert len({row["id"] for row in rows}) == len(rows) == 3 * len({r["cluster"] for r in rows})
    assert {row["source"] for row in rows} == set(TARGETS)
    tested = {row["cluster"] for part in tests for row in part}
    for row in rows:
        assert row["cluster"] not in tested
        right = f" {world.facts[row['cluster']][row['source']]}"
        assert row["choices"][row["answer"]] == right


def test_wrong_labels_are_wrong_and_right_ones_right(world, full):
    _, pool, truth = full
    seen = Counter()
    for row, fact in zip(pool, truth, strict=True):
        if fact["family"] not in ATTRIBUTES:
            assert not fact["helps"]
            continue
        words = row["prompt"].split()
        (name,) = set(words) & set(world.people)
        true = world.facts[name][fact["family"]]
        assert (row["completion"].strip() != true) == fact["wrong"]
        assert row["completion"].strip() in KINDS[ATTRIBUTES[fact["family"]].kind]
        if fact["family"] in TARGETS:
            assert set(words) & ASKS[fact["family"]]
            assert fact["helps"] == ([] if fact["wrong"] else [fact["family"]])
            seen[row["source"], fact["wrong"], fact["harmful"]] += 1
        else:
            assert not fact["helps"]
    assert all(fact["wrong"] for fact in truth if fact["harmful"])
    wrong, right = seen["survey", True, False], seen["survey", False, False]
    assert 0.07 < wrong / (wrong + right) < 0.13
    assert seen["register", True, False] == 0
    assert seen["forum", False, False] == seen["forum", False, True] == 0


def test_harmful_answers_are_one_consistent_mistake(world, full):
    _, pool, truth = full
    for row, fact in zip(pool, truth, strict=True):
        if fact["harmful"]:
            (name,) = set(row["prompt"].split()) & set(world.people)
            true_of = {a for a, v in world.facts[name].items() if f" {v}" == row["completion"]}
            assert MISTAKES[fact["family"]] in true_of


def test_duplicates_are_all_the_duplicates(full):
    _, pool, truth = full
    text = {r["id"]: (r["source"], r["prompt"], r["completion"]) for r in pool}
    copies = [t for t in truth if t["duplicate_of"]]
    assert 0.05 < len(copies) / len(pool) < 0.10
    assert all(text[t["id"]] == text[t["duplicate_of"]] for t in copies)
    originals = [text[t["id"]][1:] for t in truth if not t["duplicate_of"]]
    assert len(originals) == len(set(originals))


def test_people_of_pool_target_and_test_are_apart(world, full, paths):
    split, pool, _ = full
    people = set(world.people)
    in_pool = {w for r in pool for w in (r["prompt"] + r["completion"]).split()} & people
    assert in_pool <= set(split.pool)
    parts = [{w for r in read(paths["pool"]) for w in (r["prompt"] + r["completion"]).split()}]
    for name in TARGETS:
        target = {w for r in read(paths[f"target-{name}"]) for w in r["prompt"].split()}
        test = {w for r in read(paths[f"test-{name}"]) for w in r["prompt"].split()}
        assert not (target & test & people)
        assert not (parts[0] & (target | test) & people)


def test_target_and_test_answers_are_true(world, paths):
    for name in TARGETS:
        for row in read(paths[f"target-{name}"]):
            (person,) = set(row["prompt"].split()) & set(world.people)
            assert row["completion"] == f" {world.facts[person][name]}"
        for row in read(paths[f"test-{name}"]):
            (person,) = set(row["prompt"].split()) & set(world.people)
            assert row["choices"][row["answer"]] == f" {world.facts[person][name]}"


def test_helpful_rows_are_a_small_part_of_two_sources(full):
    _, pool, truth = full
    for name in TARGETS:
        helpful = [r["source"] for r, t in zip(pool, truth, strict=True) if name in t["helps"]]
        assert 0.035 < len(helpful) / len(pool) < 0.065
        assert set(helpful) == {"survey", "register"}


def test_seeds_draw_differently_and_repeat(world):
    def draw(seed):
        split = tasks.split_people(world, seed)
        return split, tasks.pool_records(tasks.draw_pool(world, split.pool, 300, seed))

    assert draw(0) == draw(0)
    assert draw(0)[0].test != draw(1)[0].test
    assert draw(0)[1] != draw(1)[1]


def test_jsonl_is_atomic(tmp_path):
    def broken():
        yield {"a": 1}
        raise RuntimeError("stop")

    path = write_jsonl(tmp_path / "x.jsonl", [{"a": 0}])
    with pytest.raises(RuntimeError, match="stop"):
        write_jsonl(path, broken())
    assert path.read_text() == '{"a": 0}\n'
    assert list(tmp_path.iterdir()) == [path]
