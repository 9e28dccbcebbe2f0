"""The front of mixed modules: what is searched, kept, measured and taken up again."""

import json
import random
import sys

import pytest
import torch
from tiny import base_in, rows_in

from deltaloom import Base, testing
from deltaloom.core.delta import load
from deltaloom.core.errors import InputError
from deltaloom.core.method import Trial
from deltaloom.recipe.execute import run_step
from deltaloom.recipe.parsing import parse_step
from deltaloom.report.page import write_report
from deltaloom.search import _study
from deltaloom.search._front import pareto
from deltaloom.search._mixtures import KINDS, configuration
from deltaloom.search._storage import JOURNAL
from deltaloom.search.autopeft import Autopeft

torch.set_num_threads(1)


@pytest.fixture
def given(tmp_path):
    base, rows = base_in(tmp_path / "base"), rows_in(tmp_path / "rows.jsonl", 30)
    return {"base": str(base), "data": str(rows), "name": "found", "lr": 0.01, "largest": 4}


def searched(given, out, **settings):
    values = {"method": "autopeft", **given, **settings}
    return run_step(parse_step("search", values, "search autopeft"), out)


def test_the_front_is_what_no_other_beats_in_both():
    chance = random.Random(0)
    for _ in range(50):
        trials = [
            Trial(n, {}, {"a": chance.randrange(6), "b": chance.randrange(6)}) for n in range(9)
        ]
        trials.append(Trial(9, {}, {}, failed="diverged"))
        points = [(t.values["a"], t.values["b"]) for t in trials if t.failed is None]
        wanted = {
            (a, b)
            for a, b in points
            if not any((c <= a and d <= b and (c, d) != (a, b)) for c, d in points)
        }
        front = [(t.values["a"], t.values["b"]) for t in pareto(trials, ("a", "b"))]
        assert front == sorted(wanted)


def test_configurations_are_exponents_and_bits():
    off = {**dict.fromkeys(KINDS, 0), "layer_0": 1, "layer_1": 1}
    assert configuration(off) is None
    assert configuration({**off, "serial": 3, "layer_0": 0, "layer_1": 0}) is None
    own = configuration({**off, "serial": 3, "lora": 1, "layer_0": 0})
    none = dict.fromkeys(("parallel", "prefix", "sparse"), 0)
    assert own == {"serial": 4, "lora": 1, **none, "layers": [1]}
    space = Autopeft(largest=4)._space(2)
    assert [space["serial"].low, space["serial"].high] == [0, 3]
    assert "layer_1" in space


def test_every_point_loads_and_the_choice_is_tuned_elsewhere(given, tmp_path):
    out = tmp_path / "out"
    record = searched(given, out, trials=3)
    front = json.loads((out / "front.json").read_text())
    base = Base(model=given["base"])
    for point in front:
        if point["adapter"]:
            delta = load(out / point["adapter"], base)
            model = delta.apply(base)
            held = sum(p.numel() for n, p in model.named_parameters() if "composite_" in n)
            assert held == point["parameters"]
    trials = [json.loads(line) for line in (out / "trials.jsonl").open()]
    assert front[0]["objective"] == min(trial["values"]["objective"] for trial in trials)
    assert load(out, base).kind == "composite"
    assert record["results"]["delta"] == "composite"
    write_report([out], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "The front: no other trial is better in both" in page
    assert "on untouched rows" in page
    # A mixture found on one task is tuned on another.
    values = {"method": "composite", "settings_from": str(out), "epochs": 1, "name": "other"}
    values |= {"base": given["base"], "data": str(rows_in(tmp_path / "other.jsonl", 9))}
    again = run_step(parse_step("tune", values, "tune composite"), tmp_path / "other")
    (step,) = again["recipe"]["steps"]
    assert front[0]["settings"].items() <= step["tune"].items()
    reused = load(tmp_path / "other", base)
    assert reused.kind == "composite"
    model = reused.apply(base)
    held = sum(p.numel() for n, p in model.named_parameters() if "composite_" in n)
    assert held == front[0]["parameters"]


def test_workers_give_the_same_fronts_and_cheap_attempts_are_none(given, tmp_path):
    settings = {"trials": 4, "rungs": 2, "ahead": 2}
    here = searched(given, tmp_path / "here", **settings)
    shared = searched(given, tmp_path / "shared", **settings, workers=2)
    assert testing.product(tmp_path / "here") == testing.product(tmp_path / "shared")
    # Measuring the front is counted here, and what workers did is sent back.
    for key in ("forward_tokens", "backward_tokens", "flops"):
        assert here["cost"][key] == shared["cost"][key] > 0
    trials = [json.loads(line) for line in (tmp_path / "here" / "trials.jsonl").open()]
    assert [trial["rung"] for trial in trials] == [0] * 4 + [1] * 2
    first = {json.dumps(trial["settings"]): trial for trial in trials[:4]}
    for trial in trials[4:]:
        cheap = first[json.dumps(trial["settings"])]
        if trial["cost"]:
            assert cheap["cost"]["backward_tokens"] < 0.5 * trial["cost"]["backward_tokens"]
    front = json.loads((tmp_path / "here" / "front.json").read_text())
    assert {point["trial"] for point in front} <= {4, 5}


def test_interrupted_it_ends_in_the_same_bytes(given, tmp_path, monkeypatch):
    searched(given, tmp_path / "whole", trials=3)
    count, real = 0, _study._Trials._try

    def stopped(self, *args):
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        return real(self, *args)

    monkeypatch.setattr(_study._Trials, "_try", stopped)
    with pytest.raises(KeyboardInterrupt):
        searched(given, tmp_path / "out", trials=3)
    searched(given, tmp_path / "out", trials=3)
    assert count == 4
    assert testing.product(tmp_path / "whole") == testing.product(tmp_path / "out")


def test_sparse_axes_propose_and_their_absence_is_told(given, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "botorch", None)
        missing = pytest.raises(
            InputError, match=r'needs BoTorch: pip install "deltaloom\[botorch\]"'
        )
        with missing:
            searched(given, tmp_path / "missing", trials=5, surrogate="saas")
        assert not (tmp_path / "missing" / JOURNAL).exists()
    pytest.importorskip("botorch")
    searched(given, tmp_path / "out", trials=5, surrogate="saas")
    trials = [json.loads(line) for line in (tmp_path / "out" / "trials.jsonl").open()]
    assert len({json.dumps(trial["settings"]) for trial in trials}) == 5
    assert load(tmp_path / "out", Base(model=given["base"])).kind == "composite"


def test_few_rows_are_refused(given, tmp_path):
    given["data"] = str(rows_in(tmp_path / "few.jsonl", 2))
    with pytest.raises(InputError, match="2 rows are too few to tune and compare on"):
        searched(given, tmp_path / "out")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"layers": [7]}, "has no layer 7; its 2 layers count from 0"),
        ({"layers": []}, "no layer is left to train"),
        ({"serial": 0, "parallel": 0, "prefix": 0}, "nothing to train"),
        ({"gradient_checkpointing": True}, "a prefix cannot be recomputed"),
    ],
)
def test_impossible_mixtures_are_refused(given, tmp_path, settings, sentence):
    values = {"method": "composite", "base": given["base"], "data": given["data"], **settings}

    def tuned():
        run_step(parse_step("tune", values, "tune composite"), tmp_path / "out")

    with pytest.raises(InputError, match=sentence):
        tuned()
