"""Optuna's dashboard opens the journal of a search: studies, trials, goals and the front."""

import json
from wsgiref.util import setup_testing_defaults

import pytest
from bowls import SPACE, half
from tiny import run_in

from deltaloom.search._front import pareto
from deltaloom.search._study import Outcome, Study

dashboard = pytest.importorskip("optuna_dashboard")


def asked(app, path):
    """What the dashboard answers to GET `path`, without a server around it."""
    said = {}
    path, _, query = path.partition("?")
    environment = {"PATH_INFO": path, "QUERY_STRING": query}
    setup_testing_defaults(environment)
    body = b"".join(app(environment, lambda status, *_: said.update(status=status)))
    assert said["status"].startswith("200"), (said, body)
    return json.loads(body)


def test_the_dashboard_shows_trials_and_front(tmp_path):
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    def attempt(settings, run):
        return Outcome({"loss": half(settings, run).values["loss"], "size": -settings["n"]})

    goals = {"loss": "lower", "size": "lower"}
    with run_in(tmp_path / "run", seed=1) as run:
        trials = Study(run, SPACE, goals, 8).explore(attempt)
    storage = JournalStorage(JournalFileBackend(str(tmp_path / "run" / "study.journal")))
    app = dashboard.wsgi(storage)
    (study,) = asked(app, "/api/studies")["study_summaries"]
    assert study["study_name"].startswith("deltaloom-")
    assert study["directions"] == ["minimize", "minimize"]
    shown = asked(app, f"/api/studies/{study['study_id']}?after=0")
    assert shown["objective_names"] == ["loss", "size"]
    states = {one["number"]: one["state"] for one in shown["trials"]}
    assert states == {t.number: "Fail" if t.failed else "Complete" for t in trials}
    front = {trial.number for trial in pareto(trials, ("loss", "size"))}
    assert len(front) > 1
    assert {one["number"] for one in shown["best_trials"]} == front
