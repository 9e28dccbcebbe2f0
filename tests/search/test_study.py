"""The search's machinery: proposals, records, failures, and storages that are lost."""

import math

import pytest
from bowls import SPACE, bowl
from tiny import run_in

from deltaloom.core.errors import InputError, WorkError
from deltaloom.search._space import Dimension, check_space, first_points
from deltaloom.search._storage import JOURNAL
from deltaloom.search._study import Outcome, Study, best


def study(run, trials=9, **more):
    return Study(run, SPACE, {"loss": "lower"}, trials, **more)


def test_the_best_of_a_smooth_bowl_is_found(tmp_path):
    with run_in(tmp_path / "run", seed=1) as run:
        trials = study(run, 14).explore(bowl)
        spread = [bowl(point, run.nested("check")) for point in first_points(SPACE, 14, 1)]
    found = best(trials, "loss", "lower")
    assert found.settings["kind"] == "a"
    assert found.values["loss"] < min(one.values["loss"] for one in spread)
    assert [trial.number for trial in trials] == list(range(14))


@pytest.mark.parametrize("lost", [None, "journal", "records", "torn"])
def test_interrupted_and_resumed_is_the_same_search(tmp_path, lost):
    with run_in(tmp_path / "whole") as run:
        whole = study(run).explore(bowl)
    count = 0

    def killed(settings, run):
        nonlocal count
        count += 1
        if count == 7:
            raise KeyboardInterrupt
        return bowl(settings, run)

    with pytest.raises(KeyboardInterrupt), run_in(tmp_path / "run") as run:
        study(run).explore(killed)
    journal = tmp_path / "run" / JOURNAL
    if lost == "journal":
        journal.unlink()
    if lost == "torn":
        journal.write_bytes(journal.read_bytes()[:-7])
    if lost == "records":
        for path in (tmp_path / "run" / ".work" / "trials").iterdir():
            path.unlink()
    with run_in(tmp_path / "run") as run:
        assert study(run).explore(killed) == whole
    assert count == 10


def test_nothing_is_tried_twice_and_nothing_that_is_no_trial(tmp_path):
    space = {
        "a": Dimension(low=0, high=3, integer=True),
        "b": Dimension(low=0, high=2, integer=True),
    }
    goals = {"loss": "lower", "size": "lower"}

    def product(settings, run):
        size = settings["a"] * settings["b"]
        return Outcome({"loss": 9.0 - size, "size": float(size)})

    def meaning(settings):
        return settings["a"] * settings["b"] or None

    with run_in(tmp_path / "run") as run:
        trials = Study(run, space, goals, 8, meaning=meaning).explore(product)
    found = [meaning(trial.settings) for trial in trials]
    # 1, 2, 3, 4 and 6 is all there is; then what was tried comes again, and still not nothing
    assert sorted(found[:5]) == [1, 2, 3, 4, 6]
    assert None not in found


def test_failed_trials_are_recorded_and_the_search_goes_on(tmp_path):
    def half(settings, run):
        if settings["kind"] == "b":
            raise WorkError("the loss is nan at step 3")
        if settings["n"] == 1:
            return Outcome({"loss": math.nan})
        return bowl(settings, run)

    with run_in(tmp_path / "run") as run:
        trials = study(run, 14).explore(half)
    reasons = {trial.failed for trial in trials if trial.settings["kind"] == "b"}
    assert reasons == {"the loss is nan at step 3"}
    assert {t.failed for t in trials if t.settings["kind"] == "a"} == {None, "loss is nan"}
    assert best(trials, "loss", "lower").failed is None
    # it learns to keep away from what fails
    assert sum(trial.failed is not None for trial in trials[8:]) <= 2


def test_a_search_in_which_all_fails_says_why(tmp_path):
    def never(settings, run):
        raise WorkError("out of reach")

    reason = pytest.raises(WorkError, match="all 4 trials failed; the first: out of reach")
    with reason, run_in(tmp_path / "run") as run:
        study(run, trials=4).explore(never)


def test_the_journal_opens_in_optuna(tmp_path):
    import optuna
    from optuna.storages.journal import JournalFileBackend

    def half(settings, run):
        if settings["kind"] == "b":
            raise WorkError("diverged")
        return bowl(settings, run)

    with run_in(tmp_path / "run") as run:
        trials = study(run, trials=6).explore(half)
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(tmp_path / "run" / JOURNAL)))
    (name,) = optuna.get_all_study_names(storage)
    loaded = optuna.load_study(study_name=name, storage=storage)
    assert [one.params for one in loaded.trials] == [one.settings for one in trials]
    assert loaded.best_value == best(trials, "loss", "lower").values["loss"]
    assert {one.user_attrs.get("failed") for one in loaded.trials} == {None, "diverged"}


def test_a_database_keeps_the_study_and_gives_it_back(tmp_path):
    url = f"sqlite:///{tmp_path / 'studies.db'}"
    with run_in(tmp_path / "one") as run:
        first = study(run, trials=4, storage=url).explore(bowl)
    assert not (tmp_path / "one" / JOURNAL).exists()

    def never(settings, run):
        raise AssertionError("done already")

    with run_in(tmp_path / "two") as run:
        assert study(run, trials=4, storage=url).explore(never) == first


def test_an_unreachable_database_is_named_without_its_password(tmp_path):
    url = "postgresql://me:secret@nowhere.invalid/db"
    refused = pytest.raises(InputError, match=r"storage = postgresql://me:\*\*\*@nowhere")
    with refused as caught, run_in(tmp_path / "run") as run:
        study(run, storage=url).explore(bowl)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"low": 2.0, "high": 1.0}, "is empty: low = 2 is above high = 1"),
        ({"low": 0.0, "high": 1.0, "log": True}, "low must be above 0"),
        ({"low": 0.0}, "needs low and high, or choices"),
        ({"choices": []}, "must have 1 or more"),
        ({"choices": [1, 1]}, "a choice twice"),
        ({"choices": [1], "high": 2.0}, "choices and a range"),
        ({"low": 0.5, "high": 2.0, "integer": True}, "whole numbers"),
    ],
)
def test_impossible_dimensions_are_refused(values, sentence):
    with pytest.raises(InputError, match=sentence):
        Dimension.parse(values, "space.lr")


def test_spaces_nobody_knows_are_refused():
    with pytest.raises(InputError, match="the space is empty; give at least one of lr"):
        check_space({}, ["lr"], "search width")
    with pytest.raises(InputError, match=r"space has .init_scal.; did you mean .init_scale."):
        check_space({"init_scal": SPACE["x"]}, ["lr", "init_scale"], "search width")


def test_points_fill_ranges_evenly():
    points = first_points(SPACE, 64, 0)
    assert {point["n"] for point in points} == set(range(1, 9))
    assert 24 < sum(point["x"] < 0 for point in points) < 40
    assert all(-2 <= point["x"] < 2 for point in points)
