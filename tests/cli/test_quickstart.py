"""The quickstart on a small lab: every step of it, the report and what it prints."""

import json
from functools import partial

import pytest

from deltaloom.cli import main
from deltaloom.lab import files


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(files, "write_lab", partial(files.write_lab, size="small"))


def test_the_whole_loop_ends_in_estimates_and_a_report(small, tmp_path, capsys):
    out = tmp_path / "out"
    words = [f"out={out}", "seed=3", "tuned-full.epochs=1", "tuned-random.epochs=1"]
    main.quickstart(words, json=True)
    document = json.loads(capsys.readouterr().out)
    estimates, comparisons = document["estimates"], document["comparisons"]
    for arm in ("base", "tuned-random", "tuned-less", "tuned-full"):
        one = estimates[f"{arm}/test-birth/accuracy"]
        assert one["low"] <= one["value"] <= one["high"]
        assert one["n"] == 60
    assert {"tuned-less", "tuned-less-door", "merged"} == {
        key.partition("/")[0] for key in estimates if "/test-door/" in key
    }
    assert "tuned-less - tuned-random/test-birth/accuracy" in comparisons
    assert all(step["cost"]["wall_seconds"] > 0 for step in document["steps"].values())
    page = (out / "report.html").read_text()
    assert "tuned-less" in page
    assert "<script src" not in page


def test_settings_are_changed_as_in_any_recipe(small, tmp_path):
    from deltaloom.core.errors import InputError

    with pytest.raises(InputError, match=r"no step or recipe key 'tuned-lss'; did you mean"):
        main.quickstart([f"out={tmp_path / 'out'}", "tuned-lss.lr=1"])
    with pytest.raises(InputError, match="seed = 'x': must be a whole number"):
        main.quickstart([f"out={tmp_path / 'out'}", "seed=x"])
