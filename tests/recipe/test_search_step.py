"""The verb search in recipes: its products, and later steps that take the choice."""

import json
import sys

import pytest
from tiny import base_in, rows_in

from deltaloom import methods
from deltaloom.core.errors import InputError
from deltaloom.core.run import Run
from deltaloom.recipe.execute import run_recipe, with_choice
from deltaloom.recipe.parsing import parse_recipe, parse_step

METHOD = '''
"""Choose the first of two."""
from typing import final
from deltaloom.core.method import Found, Searcher, Trial, Work

@final
class First(Searcher):
    """Chooses without looking."""
    rank: int = 3
    """Rank to choose."""
    def work(self, sizes):
        """None."""
        return Work()
    def search(self, base, data, run, *, evaluation=None):
        """Two trials, one of which failed."""
        settings = {"r": self.rank, "lr": 0.5}
        trials = (Trial(0, settings, {"loss": 1.0}), Trial(1, {"r": 9}, {}, failed="diverged"))
        return Found({"settings": settings}, trials)
'''


@pytest.fixture
def first(tmp_path, monkeypatch):
    """`search first`, from another package."""
    home = tmp_path / "package"
    (home / "firstpackage-1.dist-info").mkdir(parents=True)
    (home / "firstpackage.py").write_text(METHOD)
    info = home / "firstpackage-1.dist-info"
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: firstpackage\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[deltaloom.search]\nfirst = firstpackage:First\n")
    monkeypatch.syspath_prepend(home)
    methods.cache_clear()
    yield
    methods.cache_clear()
    sys.modules.pop("firstpackage", None)


def test_a_later_step_tunes_with_the_choice(first, tmp_path):
    base, rows = base_in(tmp_path / "base"), rows_in(tmp_path / "rows.jsonl")
    tune = {"method": "lora", "data": str(rows), "epochs": 1, "settings_from": "found"}
    content = {
        "base": str(base),
        "steps": [
            {"search": {"method": "first", "data": str(rows), "name": "found"}},
            {"tune": {**tune, "lr": 0.001, "name": "skill"}},
        ],
    }
    record = run_recipe(parse_recipe(content, "recipe"), tmp_path / "out")
    assert record["status"] == "done"
    found = tmp_path / "out" / "found"
    assert json.loads((found / "choice.json").read_text())["settings"] == {"r": 3, "lr": 0.5}
    lines = [json.loads(line) for line in (found / "trials.jsonl").read_text().splitlines()]
    assert [line["failed"] for line in lines] == [None, "diverged"]
    assert Run.read(found)["results"]["failed_trials"] == 1
    skill = tmp_path / "out" / "skill"
    assert json.loads((skill / "adapter_config.json").read_text())["r"] == 3
    (step,) = Run.read(skill)["recipe"]["steps"]
    assert (step["tune"]["r"], step["tune"]["lr"]) == (3, 0.001)


def test_choices_that_do_not_fit_are_refused(tmp_path):
    values = {"method": "lora", "base": "org/m", "data": "d", "settings_from": "found", "name": "s"}
    planned = parse_step("tune", values, "tune lora")
    with pytest.raises(InputError, match="s: settings_from = found: no finished search there"):
        with_choice(planned, {"found": tmp_path})
    (tmp_path / "choice.json").write_text('{"settings": {"width": 3}}')
    with pytest.raises(InputError, match="its choice has 'width', which tune lora does not take"):
        with_choice(planned, {"found": tmp_path})
    (tmp_path / "choice.json").write_text('{"settings": {"r": 0}}')
    with pytest.raises(InputError, match=r"r = 0: .*greater than or equal to 1"):
        with_choice(planned, {"found": tmp_path})
