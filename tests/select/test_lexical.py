"""BM25 against its formula, word by word in plain Python."""

import importlib
import json
import math
import re

import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from deltaloom.core.examples import Examples, parse
from deltaloom.select.lexical import Lexical, bm25, counted, shares, words

TEXTS = st.lists(st.lists(st.sampled_from("abcde"), max_size=8), min_size=1, max_size=6)


def by_definition(texts, query, k1, b):
    """(score, bound) of every text for one query."""
    n, mean = len(texts), sum(map(len, texts)) / len(texts)
    scores, bound = [0.0] * n, 0.0
    for word in query:  # as often as the query says it
        having = sum(word in text for text in texts)
        idf = math.log(1 + (n - having + 0.5) / (having + 0.5))
        bound += idf * (k1 + 1)
        for i, text in enumerate(texts):
            count = text.count(word)
            if count:
                scores[i] += idf * count * (k1 + 1) / (count + k1 * (1 - b + b * len(text) / mean))
    return scores, bound


@given(TEXTS, TEXTS, st.sampled_from([0.0, 1.2, 2.0]), st.sampled_from([0.0, 0.75, 1.0]))
def test_scores_equal_the_formula(texts, queries, k1, b):
    asked = [{word: query.count(word) for word in query} for query in queries]
    names = sorted({word for query in queries for word in query})
    weights, idf = bm25(texts, names, k1, b)
    got = shares(weights, counted(asked, names), idf * (k1 + 1))
    assert got.shape == (len(texts), len(queries))
    for column, query in zip(got.T, queries, strict=True):
        scores, bound = by_definition(texts, query, k1, b)
        wanted = [score / bound if bound else 0.0 for score in scores]
        np.testing.assert_allclose(column, wanted, rtol=0, atol=1e-6)


def test_many_rows_are_scored_in_blocks(monkeypatch):
    module = importlib.import_module("deltaloom.select.lexical")
    texts = [[*"abc"[: i % 4], *"de"[: i % 3]] for i in range(50)]
    weights, idf = bm25(texts, [*"abcde"], 1.2, 0.75)
    wishes = counted([{"a": 1, "e": 2}, {"c": 1}], [*"abcde"])
    whole = shares(weights, wishes, idf * 2.2)
    monkeypatch.setattr(module, "ROWS", 7)
    assert shares(weights, wishes, idf * 2.2).tobytes() == whole.tobytes()


def examples(tmp_path, name, rows):
    path = tmp_path / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Examples.read(path)


@pytest.fixture
def setting(tmp_path):
    pool = [
        {"id": "z0", "prompt": "Where is the Eiffel tower?", "completion": "In Paris."},
        {"id": "z1", "prompt": "What is the sum of two and two?", "completion": "Four."},
        {"id": "z2", "text": "The paris metro is the old one, the Paris metro."},
        {"id": "z3", "text": "Nothing here."},
        {"id": "z4", "prompt": "Add seven to two.", "completion": "Nine is the sum."},
    ]
    target = [
        {"id": "q0", "prompt": "Where does the PARIS metro go?", "completion": "Everywhere."},
        {"id": "q1", "prompt": "Sum of three and two?", "completion": "Five is the sum."},
    ]
    return examples(tmp_path, "pool", pool), examples(tmp_path, "target", target)


def test_selection_follows_the_formula(setting, tmp_path):
    pool, target = setting

    def spelled(row):
        text = " ".join([row.prompt or "", row.text or "", row.completion or ""])
        return re.findall(r"\w+", text.lower())

    texts = [spelled(row) for row in pool]
    columns = []
    for row in target:
        scores, bound = by_definition(texts, spelled(row), 1.2, 0.75)
        columns.append(np.array(scores) / bound)
    influence = np.array(columns).T
    for pick in ("top", "round_robin"):
        run = tiny.run_in(tmp_path / pick)
        got = Lexical(count=4, pick=pick).select(pool, run, target=target)
        np.testing.assert_allclose(got.scores.index["score"], influence.max(axis=1), atol=1e-6)
        if pick == "top":
            wanted = np.argsort(-influence.max(axis=1))[:4]
        else:
            left, wanted = [*range(5)], []
            for turn in range(4):
                wanted.append(max(left, key=lambda i: influence[i, turn % 2]))
                left.remove(wanted[-1])
        assert got.chosen.ids == [pool.ids[i] for i in wanted]
    assert got.reasons["z2"].startswith("shares 'metro', 'paris'")
    assert got.reasons["z2"].endswith("with target row q0")
    assert "'sum'" in got.reasons["z1"]
    assert "target row q1" in got.reasons["z1"]


def test_a_row_that_shares_nothing_says_so(setting, tmp_path):
    pool, target = setting
    got = Lexical(count=5).select(pool, tiny.run_in(tmp_path / "run"), target=target)
    assert got.reasons["z3"].startswith("shares no word with target row")
    assert got.scores.index["score"][3] == 0


def test_long_target_rows_do_not_win_by_length(tmp_path):
    pool = examples(tmp_path, "pool", [{"text": "alpha beta"}, {"text": "gamma delta"}])
    short = {"text": "gamma delta"}
    long = {"text": "alpha one two three four five six seven eight nine"}
    target = examples(tmp_path, "target", [short, long])
    got = Lexical(count=1, pick="top").select(pool, tiny.run_in(tmp_path / "run"), target=target)
    assert got.chosen[0].text == "gamma delta"


def test_words_of_any_script():
    row = parse("here", "s", {"text": "Ünïcode_x, Straße-2; слово? x²"})
    assert words(row) == ["ünïcode_x", "strasse", "2", "слово", "x²"]
