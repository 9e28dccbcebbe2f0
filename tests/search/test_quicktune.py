"""Quicktune: trials that pause, what is recorded, what is taken from the past, what is refused."""

import json

import pytest
from tiny import base_in, rows_in

from deltaloom import testing
from deltaloom.core.base import Base
from deltaloom.core.delta import load
from deltaloom.core.errors import InputError
from deltaloom.recipe.execute import run_step
from deltaloom.recipe.parsing import parse_step
from deltaloom.search import _parts
from deltaloom.search._past import read_history


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    home = tmp_path_factory.mktemp("quicktune")
    base, rows = base_in(home / "base"), rows_in(home / "rows.jsonl", 40)
    return {
        "base": str(base),
        "data": str(rows),
        "evaluate": str(rows_in(home / "held.jsonl", 12, 40)),
    }


def searched(given, out, **settings):
    values = {"method": "quicktune", **given, "name": "found", "parts": 2, "steps": 5}
    values |= {"fixed": {"save_steps": 999}}
    values |= {"candidates": 8, **settings}
    return run_step(parse_step("search", values, "search quicktune"), out)


@pytest.fixture(scope="module")
def found(given, tmp_path_factory):
    out = tmp_path_factory.mktemp("found") / "out"
    return out, searched(given, out)


def lines(path):
    return [json.loads(line) for line in path.open()]


def test_the_chosen_trial_ends_as_plain_tuning_does(given, found, tmp_path):
    out, record = found
    choice = record["results"]["choice"]
    values = {"method": "lora", **given, "settings_from": str(out), "name": "plain"}
    del values["evaluate"]
    run_step(parse_step("tune", values, "tune lora"), tmp_path / "plain")
    for name in ("adapter_model.safetensors", "adapter_config.json", "delta.json"):
        assert (out / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    base = Base(model=given["base"])
    assert load(out, base).kind == "lowrank"
    trials = lines(out / "trials.jsonl")
    assert choice["objective"] == min(t["values"]["objective"] for t in trials)
    parts = sum(round(2 * t["values"]["share"]) for t in trials)
    assert parts == 5
    assert choice["finished"] < choice["untuned"]


def test_the_journal_opens_in_optuna(found):
    import optuna
    from optuna.storages.journal import JournalFileBackend

    out, _ = found
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(out / "study.journal")))
    (name,) = optuna.get_all_study_names(storage)
    study = optuna.load_study(study_name=name, storage=storage)
    assert [one.params for one in study.trials] == [
        one["settings"] for one in lines(out / "trials.jsonl")
    ]


def test_stopped_in_a_part_it_makes_the_same_search(given, found, tmp_path, monkeypatch):
    count, real = 0, _parts.Parts.measure

    def stopped(self, model):
        nonlocal count
        count += 1
        if count in (3, 5):  # the untuned base is measured first, and kept
            raise KeyboardInterrupt
        return real(self, model)

    monkeypatch.setattr(_parts.Parts, "measure", stopped)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            searched(given, tmp_path / "out")
    searched(given, tmp_path / "out")
    assert count == 9
    assert testing.product(found[0]) == testing.product(tmp_path / "out")


def test_a_diverged_trial_is_recorded_and_the_search_goes_on(given, tmp_path):
    space = {"lr": {"choices": [1e-3, 1e30, 1e-2]}}
    record = searched(given, tmp_path / "out", space=space, steps=6, finish=False)
    trials = lines(tmp_path / "out" / "trials.jsonl")
    assert {t["settings"]["lr"] for t in trials if t["failed"]} == {1e30}
    assert record["results"]["failed_trials"] == 1
    assert record["results"]["choice"]["settings"]["lr"] == 1e-2
    assert not (tmp_path / "out" / "adapter_config.json").exists()


def test_a_budget_of_flops_ends_it(given, tmp_path):
    record = searched(given, tmp_path / "out", steps=9, flops=1.0, finish=False)
    assert record["results"]["trials"] == 1


def test_what_it_left_and_tune_runs_warm_up_the_next(given, found, tmp_path):
    values = {"method": "lora", **given, "epochs": 2, "lr": 1e-2, "name": "run"}
    for rank in (2, 4):
        run_step(parse_step("tune", {**values, "r": rank}, "tune lora"), tmp_path / f"r{rank}")
    names = [str(found[0]), str(tmp_path / "r2"), str(tmp_path / "r4")]
    search, runs = read_history(names, "lora", "loss_per_token")
    assert all(point.seconds for trial in search.trials for point in trial.curve)
    assert [trial.settings["r"] for trial in runs.trials] == [2, 4]
    assert [point.share for point in runs.trials[0].curve] == [0.5, 1.0]
    assert runs.features["rows"] == search.features["rows"]
    record = searched(given, tmp_path / "out", history=names, steps=2, seconds=1e9, finish=False)
    (trial,) = lines(tmp_path / "out" / "trials.jsonl")
    best = found[1]["results"]["choice"]
    assert trial["values"]["share"] == 1.0
    assert record["results"]["choice"]["objective"] <= 1.2 * best["finished"]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"space": {}}, "the space is empty; give at least one of"),
        ({"space": {"rank": {"low": 1, "high": 2}}}, "space has 'rank'"),
        ({"space": {"lr": {"low": 2, "high": 1}}}, "is empty: low = 2 is above high = 1"),
        ({"fixed": {"lr": 1e-3}}, "lr is in space and in fixed"),
        ({"fixed": {"micro_batch": 16}}, "which tune lora does not take .*micro_batch = 16"),
        ({"fixed": {"epochs": 0.2}}, "optimizer steps on 40 rows, fewer than parts = 2"),
        ({"tuner": "prompt", "fixed": {"start": "x"}}, "cannot pause; leave start out"),
        ({"history": ["nowhere"]}, "history: nowhere: no history file"),
        ({"trust": "nowhere"}, "no finished `search proxy` there"),
        ({"trust": "nowhere", "alike": True}, "trust and alike say two things"),
    ],
)
def test_impossible_searches_are_refused(given, tmp_path, settings, sentence):
    with pytest.raises(InputError, match=sentence):
        searched(given, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_a_history_of_another_tuner_or_metric_is_refused(given, found, tmp_path):
    content = json.loads((found[0] / "history.json").read_text())
    path = tmp_path / "other.json"
    for key, own, sentence in (
        ("tuner", "full", "has tuner = full, and this search lora"),
        ("metric", "accuracy", "has metric = accuracy, and this search loss_per_token"),
        ("untuned", "high", "untuned"),
    ):
        path.write_text(json.dumps({**content, key: own}))
        with pytest.raises(InputError, match=sentence):
            searched(given, tmp_path / key, history=[str(path)])
    path.write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        searched(given, tmp_path / "out", history=[str(path)])
