"""Trials shared among workers: the same as without, deaths survived, cheap attempts first."""

import json
import os
from pathlib import Path

import pytest
from bowls import SPACE, Dying, bowl, half
from tiny import run_in

from deltaloom.core.run import Workers
from deltaloom.engine import shards
from deltaloom.search._study import Outcome, Study


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)


def explored(folder, *attempts, workers=0, cluster=None, trials=8, **more):
    with run_in(folder, seed=3) as run:
        run.workers = Workers(workers, cluster)
        study = Study(run, SPACE, {"loss": "lower"}, trials, **more)
        return study.explore(*attempts), run.record


def test_workers_make_the_same_search_also_when_some_are_killed(tmp_path):
    wanted, here = explored(tmp_path / "here", half, ahead=3)
    attempt = Dying(half, tmp_path, {"trial-6": 1})
    found, record = explored(tmp_path / "shared", attempt, workers=2, ahead=3)
    assert (tmp_path / "died-trial-6-0").exists()
    assert found == wanted
    assert record["cost"]["forward_tokens"] == here["cost"]["forward_tokens"] > 0
    assert record["notes"]["rows"] == 7
    assert {trial.failed for trial in wanted} == {None, "the loss is nan at step 3"}
    # another proposal is made when the last results are known
    assert explored(tmp_path / "last", half, ahead=1)[0] != wanted


def test_a_cluster_makes_the_same_search(tmp_path):
    pytest.importorskip("ray")
    wanted, _ = explored(tmp_path / "here", bowl, trials=6, ahead=2)
    found, _ = explored(tmp_path / "shared", bowl, trials=6, ahead=2, workers=2, cluster="local")
    assert found == wanted


def test_a_trial_that_keeps_killing_its_worker_failed(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(shards, "TRIES", 1)
    attempt = Dying(bowl, tmp_path, {"trial-2": 9})
    found, _ = explored(tmp_path / "run", attempt, workers=2, trials=4)
    assert [trial.number for trial in found] == list(range(4))
    assert {t.number: t.failed for t in found if t.failed} == {
        2: "1 workers died over it (exit status -9)"
    }
    assert "after the first 3 trials 1 of 2 workers are busy at most" in capfd.readouterr().err


def test_a_third_goes_on_to_each_further_attempt(tmp_path):
    def attempts(made):
        def cheap(settings, run):
            made.append("cheap")
            return Outcome({"loss": bowl(settings, run).values["loss"] + 0.1})

        def whole(settings, run):
            made.append("whole")
            return bowl(settings, run)

        return cheap, whole

    made = []
    found, _ = explored(tmp_path / "run", *attempts(made))
    assert made == ["cheap"] * 8 + ["whole"] * 3
    first, last = ([t for t in found if t.rung == rung] for rung in (0, 1))
    assert [t.number for t in found] == list(range(11))
    in_order = sorted(first, key=lambda t: (t.values["loss"], t.number))
    assert [t.settings for t in last] == [t.settings for t in in_order[:3]]
    stopped, at = attempts([]), 9

    def killed(settings, run):
        nonlocal at
        at -= 1
        if at < 0:
            raise KeyboardInterrupt
        return stopped[at == 0](settings, run)

    with pytest.raises(KeyboardInterrupt):
        explored(tmp_path / "again", killed, killed)
    assert explored(tmp_path / "again", *attempts(again := []))[0] == found
    assert again == ["whole"] * 2


def test_cheap_attempts_are_pruned_trials_of_the_study(tmp_path):
    import optuna
    from optuna.storages.journal import JournalFileBackend

    explored(tmp_path / "run", half, bowl, trials=6)
    journal = JournalFileBackend(str(tmp_path / "run" / "study.journal"))
    storage = optuna.storages.JournalStorage(journal)
    (name,) = optuna.get_all_study_names(storage)
    trials = optuna.load_study(study_name=name, storage=storage).trials
    states = [one.state.name for one in trials]
    assert states[6:] == ["COMPLETE"] * 2
    assert set(states[:6]) == {"PRUNED", "FAIL"}
    kept = [json.loads(one.user_attrs["trial"]) for one in trials]
    assert [one["rung"] for one in kept] == [0] * 6 + [1] * 2
