"""Budgets and duplicates against a plain reading of the rows."""

import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from deltaloom.core.base import Base
from deltaloom.core.encoding import encode
from deltaloom.core.errors import InputError
from deltaloom.core.examples import Examples, parse
from deltaloom.select._text import normalised
from deltaloom.select.random import Random, draw


class Notes:
    """As much of a run as `take` needs."""

    def __init__(self):
        self.notes = {}

    def note(self, **facts):
        self.notes.update(facts)


def rows(*contents):
    items = (
        parse(f"line {i}", "s", {"id": f"r{i}", **content}) for i, content in enumerate(contents)
    )
    return Examples(items, "pool")


def texts(*contents):
    return rows(*({"text": content} for content in contents))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return Base(model=str(tiny.base_in(tmp_path_factory.mktemp("base"))))


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    return Examples.read(tiny.rows_in(tmp_path_factory.mktemp("pool") / "pool.jsonl", 30))


def test_count_and_fraction_take_the_beginning_of_the_order():
    pool, order = texts(*"abcdefghij"), [5, 3, 9, 0, 1, 2, 4, 6, 7, 8]
    for settings, kept in (({"count": 3}, 3), ({"fraction": 0.5}, 5), ({}, 1)):
        method = Random(**settings)
        assert method.reach(10) == kept
        assert method.take(pool, order, Notes()).ids == [f"r{i}" for i in order[:kept]]


@given(st.integers(1, 400), st.integers(0, 50))
def test_tokens_keep_the_longest_beginning_that_fits(base, pool, tokens, seed):
    order = draw(len(pool), len(pool), seed)
    method, run = Random(tokens=tokens), Notes()
    lengths = [len(row.input_ids) for row in encode(pool, base.tokenizer(), 64)]
    fits = [k for k in range(31) if sum(lengths[i] for i in order[:k]) <= tokens]
    if max(fits) == 0:
        with pytest.raises(InputError, match=f"tokens = {tokens}: not even the first chosen row"):
            method.take(pool, order, run, base)
        return
    assert method.take(pool, order, run, base).ids == [pool[i].id for i in order[: max(fits)]]
    assert run.notes == {"chosen_tokens": sum(lengths[i] for i in order[: max(fits)])}


def test_tokens_count_what_the_context_keeps(tmp_path):
    base = Base(model=str(tiny.base_in(tmp_path, max_position_embeddings=8)))
    pool, run = rows({"prompt": "who " * 30, "completion": "tom"}), Notes()
    assert len(Random(tokens=8).take(pool, [0], run, base)) == 1
    assert run.notes == {"chosen_tokens": 8}


def test_tokens_need_a_tokenizer(pool):
    with pytest.raises(InputError, match="tokens= needs base=, whose tokenizer counts them"):
        Random(tokens=10).take(pool, [0, 1], Notes())


@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=12), st.integers(0, 9), st.data())
def test_duplicates_leave_the_first_chosen(contents, seed, data):
    pool = texts(*contents)
    count = data.draw(st.integers(1, len(pool)))
    order = np.random.default_rng(seed).permutation(len(pool)).tolist()
    method, run = Random(count=count, deduplicate=True), Notes()
    assert method.reach(len(pool)) == len(pool)
    chosen = method.take(pool, order, run)
    wanted, dropped = [], 0
    for i in order:
        if len(wanted) < count:
            if contents[i] in [contents[j] for j in wanted]:
                dropped += 1
            else:
                wanted.append(i)
    assert chosen.ids == [f"r{i}" for i in wanted]
    assert run.notes == {"duplicates_dropped": dropped}


def test_dropped_rows_cost_no_tokens(base):
    pool, run = texts("who lives", "who lives", "tom", "anna likes"), Notes()
    chosen = Random(tokens=5, deduplicate=True).take(pool, [0, 1, 2, 3], run, base)
    assert chosen.ids == ["r0", "r2"]  # 3 and 2 tokens with their ends
    assert run.notes == {"duplicates_dropped": 1, "chosen_tokens": 5}


def same(a, b):
    return normalised(rows(a)[0]) == normalised(rows(b)[0])


def test_what_counts_as_the_same_text():
    assert same({"text": "Who  lives\n there?"}, {"text": "who lives THERE? "})
    assert same({"text": "caf\u00e9"}, {"text": "cafe\u0301"})
    assert same({"text": "Straße"}, {"text": "STRASSE"})
    assert not same({"text": "x\u00b2"}, {"text": "x2"})
    assert not same({"text": "who lives"}, {"text": "wholives"})
    pair = {"prompt": "who", "completion": "tom"}
    chat = [{"role": "user", "content": "who"}, {"role": "assistant", "content": "Tom"}]
    assert same(pair, {"messages": chat})
    assert not same(pair, {"prompt": "who", "completion": "anna"})
    question = {"prompt": "who", "choices": ["tom", "anna"], "answer": "tom"}
    assert not same(question, {**question, "choices": ["tom", "sue"]})


def test_one_budget_at_a_time():
    for settings, said in (
        ({"fraction": 0.1, "count": 3}, "fraction or count, not both"),
        ({"count": 1, "tokens": 3}, "count or tokens, not both"),
    ):
        with pytest.raises(InputError, match=said):
            Random.parse(settings, "select random")


def test_budgets_in_rows():
    assert Random(fraction=0.5).budget(31) == 16
    assert Random().budget(1000) == 50
    assert Random(count=7).budget(10) == 7
    assert Random(tokens=7).budget(10) == 10
    with pytest.raises(InputError, match="count = 7 is more than the pool's 5 rows"):
        Random(count=7).budget(5)


def test_random_is_a_seeded_permutation(pool, base, tmp_path):
    chosen = [
        Random(count=10).select(pool, tiny.run_in(tmp_path / str(k), seed=seed)).chosen.ids
        for k, seed in enumerate((0, 0, 1))
    ]
    assert chosen[0] == chosen[1] != chosen[2]
    assert len(set(chosen[0])) == 10
    assert chosen[0] == [pool.ids[i] for i in np.random.default_rng(0).permutation(30)[:10]]
    run = tiny.run_in(tmp_path / "tokens")
    few = Random(tokens=40).select(pool, run, base=base).chosen
    assert 0 < run.record["notes"]["chosen_tokens"] <= 40
    assert chosen[0][: len(few)] == few.ids[:10]
