"""Choosing from the past alone: relevance of past tasks, the choice, and what takes both."""

import json

import numpy as np
import pytest
from tiny import base_in, rows_in

from deltaloom.core.errors import InputError
from deltaloom.recipe.execute import run_step
from deltaloom.recipe.parsing import parse_step
from deltaloom.search import _policy
from deltaloom.search._past import PastTrial, Point, Task
from deltaloom.search._space import Dimension
from deltaloom.search._trust import judge_past

SPACE = {"lr": Dimension(low=1e-5, high=1e-1, log=True)}
RATES = [10 ** (k / 2) for k in range(-10, -1)]
CANDIDATES = [{"lr": lr} for lr in RATES]


def task(name, best, feature):
    """A past task whose loss is lowest at 10^best, which its one feature tells."""
    draw = np.random.default_rng(int(100 * feature))
    trials = [
        PastTrial(
            settings={"lr": lr},
            curve=[Point(share=1.0, value=1 + 0.1 * (np.log10(lr) - best) ** 2 + 0.02 * noise)],
        )
        for lr, noise in zip(RATES, draw.normal(size=len(RATES)), strict=True)
    ]
    about = {"features": {"kind": feature}, "untuned": 4.0}
    return Task(tuner="lora", metric="loss", name=name, trials=trials, **about)


PAST = [task(f"low{k}", -4.0, k / 10) for k in range(4)] + [
    task(f"high{k}", -2.0, 5 + k / 10) for k in range(4)
]


@pytest.mark.parametrize(("feature", "kind", "best"), [(0.15, "low", -4), (5.15, "high", -2)])
def test_tasks_like_the_target_are_trusted_and_say_what_to_choose(feature, kind, best):
    target = Task(
        tuner="lora", metric="loss", name="t", features={"kind": feature}, untuned=4.0, trials=[]
    )
    weights, means = judge_past(SPACE, CANDIDATES, target, PAST, 0.5, 0)
    like = np.array([one.name.startswith(kind) for one in PAST])
    assert weights[like].min() > 0.8
    assert weights[~like].max() < 0.2
    assert RATES[int(np.argmin(means))] == pytest.approx(10**best, rel=4)
    _, pooled = judge_past(
        SPACE, CANDIDATES, target.model_copy(update={"features": {}}), PAST, 0.5, 0
    )
    assert 1e-4 < RATES[int(np.argmin(pooled))] < 1e-2


@pytest.fixture
def given(tmp_path):
    base, rows = base_in(tmp_path / "base"), rows_in(tmp_path / "rows.jsonl", 24)
    return {"base": str(base), "data": str(rows)}


def step(method, given, out, **settings):
    values = {"method": method, **given, "name": "found", **settings}
    return run_step(parse_step("search", values, f"search {method}"), out)


def test_quicktune_takes_what_it_found(given, tmp_path, monkeypatch):
    weights, real = [], _policy.Policy
    monkeypatch.setattr(_policy, "Policy", lambda *args: weights.append(args[5]) or real(*args))
    files = []
    for one in PAST[2:6]:
        files.append(str(tmp_path / f"{one.name}.json"))
        one.model_copy(update={"metric": "loss_per_token"}).write(tmp_path / f"{one.name}.json")
    space = {name: one.model_dump() for name, one in SPACE.items()}
    record = step("proxy", given, tmp_path / "proxy", history=files, space=space)
    found = json.loads((tmp_path / "proxy" / "relevance.json").read_text())
    assert [*found] == files
    assert record["results"]["trials"] == 0
    assert 1e-5 <= record["results"]["choice"]["settings"]["lr"] <= 1e-1
    more = {"space": space, "steps": 1, "parts": 2, "candidates": 8, "finish": False}
    trusted = {"history": files, "trust": str(tmp_path / "proxy")}
    step("quicktune", given, tmp_path / "tuned", **more, **trusted)
    # by itself it trusts the past as much as the proxy says
    step("quicktune", given, tmp_path / "features", **more, history=files)
    step("quicktune", given, tmp_path / "alike", **more, history=files, alike=True)
    assert weights == [pytest.approx(list(found.values())), weights[0], None]
    other = tmp_path / "low1.json"
    PAST[1].model_copy(update={"metric": "loss_per_token"}).write(other)
    trusted["history"] = [str(other)]
    with pytest.raises(InputError, match=r"says nothing of .*low1"):
        step("quicktune", given, tmp_path / "no", **more, **trusted)


def test_without_a_past_it_is_the_tuners_own_settings(given, tmp_path):
    record = step("proxy", given, tmp_path / "proxy")
    assert record["results"]["choice"]["settings"] == {"lr": 2e-4, "batch_size": 16, "r": 8}
