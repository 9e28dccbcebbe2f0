"""Mixtures of judgement data sets: shares, orders, forms, and what is refused."""

import json
from collections import Counter

import pytest

import deltaloom
from deltaloom.core.errors import InputError
from deltaloom.core.examples import Examples, parse
from deltaloom.core.run import Run
from deltaloom.measure._judge_prompts import request, verdict_in
from deltaloom.measure._judgements import judgements
from deltaloom.select.judgements import Judgements


def pair(k, source="pairs", **more):
    row = {"input": f"task {k}", "output_1": f"good {k}", "output_2": f"bad {k}", "label": 1}
    return {**row, "source": source, **more}


def score(k, source="scores"):
    return {"prompt": f"task {k}", "response": f"r{k}", "score": 1 + k % 3, "source": source}


def claim(k, source="claims"):
    return {"prompt": f"claim {k}", "label": ["no", "yes"][k % 2], "source": source}


def chosen(tmp_path, given, seed=0, **settings):
    data = Examples(parse(f"p.jsonl line {k}", "p", dict(row)) for k, row in enumerate(given, 1))
    with Run.open(tmp_path / f"run{seed}", {"steps": []}, {}, seed) as run:
        found = Judgements(**settings).select(data, run, target=None, base=None)
        return list(found.chosen)


def test_every_format_becomes_prompt_and_verdict(tmp_path):
    critique = {"prompt": "t", "response": "r", "critique": "too short", "source": "critiques"}
    given = [pair(0), score(0), score(1), claim(0), claim(1), critique]
    found = chosen(tmp_path, given)
    answers = [row.completion for row in found]
    assert answers == [
        *("verdict: A", "verdict: B"),  # both orders
        *("verdict: 1", "verdict: 2", "verdict: no", "verdict: yes", "critique: too short"),
    ]
    assert verdict_in(answers[0], ("A", "B")) == "A"
    # The prompts are what `measure judge` asks.
    asked = judgements(Examples([parse("l", "p", pair(0))]), [], False, False)[0]
    assert [row.prompt for row in found[:2]] == [request(asked), request(asked, swapped=True)]
    assert len({row.id for row in found}) == len(found)
    assert found[0].cluster == found[1].cluster


def test_shares_go_by_size_up_to_the_cap(tmp_path):
    given = [*map(score, range(60)), *(claim(k) for k in range(20))]
    found = chosen(tmp_path, given, rows=40)
    assert Counter(row.source for row in found) == {"scores": 30, "claims": 10}
    capped = chosen(tmp_path, given, rows=20, cap=20)
    assert Counter(row.source for row in capped) == {"scores": 10, "claims": 10}
    assert len(chosen(tmp_path, given, cap=30)) == 50
    odd = chosen(tmp_path, given, rows=7)
    assert Counter(row.source for row in odd) == {"scores": 5, "claims": 2}


def test_the_seed_draws(tmp_path):
    given = [*map(score, range(60))]
    one, again, other = (
        [row.id for row in chosen(tmp_path / name, given, seed, rows=20)]
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert one == again != other


def test_orders_and_forms(tmp_path):
    given = [pair(k) for k in range(40)]
    random = chosen(tmp_path, given, orders="random")
    assert len(random) == 40
    assert 8 < sum(row.completion == "verdict: A" for row in random) < 32
    for row in random:
        good = row.prompt.index("good") < row.prompt.index("bad")
        assert row.completion == f"verdict: {'A' if good else 'B'}"
    classes = chosen(tmp_path, given, form="classes", orders="given")
    assert {row.completion for row in classes} == {"A"}
    (first, *_) = chosen(tmp_path, given, form="messages")
    assert [turn["role"] for turn in first.messages] == ["user", "assistant"]


def test_the_form_is_that_in_which_the_base_is_asked(tmp_path):
    from deltaloom.core.base import Base
    from deltaloom.lab.files import tiny_base

    base = Base(model=str(tiny_base(tmp_path / "base")))
    data = Examples([parse("p.jsonl line 1", "p", pair(0))])

    def written(base):
        with Run.open(tmp_path / f"run-{base and base.labels}", {"steps": []}, {}, 0) as run:
            return Judgements().select(data, run, target=None, base=base).chosen[0]

    assert written(None).completion == "verdict: A"
    assert written(base).messages is not None  # the lab's tokenizer has a chat template
    assert written(base.model_copy(update={"labels": ("A", "B")})).completion == "A"


def test_ties_are_learned_only_where_they_may_be_said(tmp_path):
    given = [pair(0), pair(1, label="tie")]
    assert len(chosen(tmp_path, given)) == 2
    with_ties = chosen(tmp_path, given, ties=True)
    assert [row.completion for row in with_ties[2:]] == ["verdict: tie"] * 2


def test_instructions_are_mixed_in_as_they_are(tmp_path):
    plain = {"prompt": "say hi", "completion": "hi", "source": "flan"}
    found = chosen(tmp_path, [plain, pair(0)])
    assert [row.completion for row in found] == ["hi", "verdict: A", "verdict: B"]


@pytest.mark.parametrize(
    ("given", "settings", "message"),
    [
        ([pair(0), {**pair(1), "label": None}], {}, "line 2: has no label"),
        ([score(0), score(1), {**score(2), "score": None}], {}, "line 3: has no label"),
        ([{"prompt": "t", "chosen": ["a"], "rejected": ["b"]}], {}, "line 1: several responses"),
        ([score(0), score(1)], {"labels": ["2", "3"]}, "line 1: label '1' is none of the verdicts"),
    ],
)
def test_missing_and_strange_labels_name_their_line(given, settings, message, tmp_path):
    with pytest.raises(InputError, match=message):
        chosen(tmp_path, given, **settings)


def test_files_are_mixed_and_learned_from(tmp_path):
    """The whole way: two files, one mixture, a tuned judge, measured."""
    from deltaloom.lab.files import tiny_base

    base = tiny_base(tmp_path / "base")
    for name, row in (("llmbar", pair), ("rated", score)):
        rows = [{k: v for k, v in row(i).items() if k != "source"} for i in range(4)]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    pool = [tmp_path / "llmbar.json", tmp_path / "rated.json"]
    mixed = deltaloom.select("judgements", base=base, pool=pool, out=tmp_path / "mixture")
    assert mixed.sources() == {"llmbar": 8, "rated": 4}
    deltaloom.tune(
        "lora", base=base, data=tmp_path / "mixture", out=tmp_path / "judge", epochs=1, batch_size=4
    )
    found = deltaloom.measure(
        "judge", base=base, deltas=[tmp_path / "judge"], tasks=pool[0], out=tmp_path / "measured"
    )
    assert found["judge--llmbar"].n == 4
