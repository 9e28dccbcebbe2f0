"""The sections about mixtures and stages: what they list, and what they say of broken files."""

import json
import re
from itertools import pairwise

import fake_runs
import pytest

from deltaloom.report.mixture import mixtures
from deltaloom.report.page import render
from deltaloom.report.reading import read_runs
from deltaloom.report.stages import staged


def mixed(home, effects=True):
    """A select step that weighed the pool's sources."""
    pool = fake_runs.pool_rows(home, 90)
    folder = home / "mix"
    fake_runs.select(folder, pool, {"method": "tailpatch"}, scored=False)
    names = sorted(pool.sources())
    about = {"before": {name: pool.sources()[name] / 90 for name in names}, "measure": "loss"}
    about["cost"] = {"run_tokens": 1000, "most_tokens": 92, "share": 0.092}
    if effects:
        signs = [0.5, -0.5, 0.0, 0.25, 0.1]
        about["effects"] = {
            name: {"<b>dev": {"value": v, "low": v - 0.2, "high": None if v == 0.1 else v + 0.2}}
            for name, v in zip(names, signs, strict=True)
        }
        about["ratings"] = {name: {"<b>dev": 2 if k == 0 else -1} for k, name in enumerate(names)}
    weights = {name: (k + 1) / 15 for k, name in enumerate(names)}
    record = {"schema": 1, "unit": "examples", "weights": weights, "about": about}
    (folder / "weights.json").write_text(json.dumps(record))
    run = json.loads((folder / "run.json").read_text())
    run["cost"]["forward_tokens"] = 90.0
    (folder / "run.json").write_text(json.dumps(run))
    return folder, weights


def tuned(home, record):
    folder = home / "skills"
    fake_runs.tune(folder, ["pool.jsonl"], 1e5, method="staged")
    (folder / "stages.json").write_text(record if isinstance(record, str) else json.dumps(record))
    return folder


def test_sources_stand_by_weight_with_effects_and_ratings(tmp_path):
    folder, weights = mixed(tmp_path)
    report = read_runs([folder])
    (found,) = mixtures(report)
    assert [one.name for one in found.sources] == sorted(weights, key=lambda n: -weights[n])
    last = found.sources[-1]
    assert last.effects[0].text == "+0.50 [0.30, 0.70]"
    assert last.effects[0].rating == "helpful"
    ((target, chart),) = found.charts
    assert target == "<b>dev"
    assert [one.value for one in chart] == sorted((one.value for one in chart), reverse=True)
    page = render(report)
    section = page[page.index('id="mixtures"') : page.index('id="selection"')]
    assert "<b>dev" not in section
    assert "&lt;b&gt;dev" in section
    assert "Effect on" in section
    assert "(at most 9.2 % of the run they are for)" in section
    levels = [int(level) for level in re.findall(r"<h([1-6])", page)]
    assert all(b <= a + 1 for a, b in pairwise(levels))


def test_a_rating_that_is_no_number_is_left_out(tmp_path):
    folder, _ = mixed(tmp_path)
    record = json.loads((folder / "weights.json").read_text())
    for number, own in enumerate(record["about"]["ratings"].values()):
        own["<b>dev"] = [None, "2", [2], {"helpful": 2}][number % 4]
    (folder / "weights.json").write_text(json.dumps(record))
    (found,) = mixtures(read_runs([folder]))
    assert {one.effects[0].rating for one in found.sources} == {""}


def test_weights_alone_are_a_table_without_charts(tmp_path):
    folder, _ = mixed(tmp_path, effects=False)
    page = render(read_runs([folder]))
    section = page[page.index('id="mixtures"') : page.index('id="selection"')]
    assert "Before" in section
    assert "Effect on" not in section


def test_broken_weights_leave_no_section(tmp_path):
    folder, _ = mixed(tmp_path)
    for broken in ("{", "[]", '{"weights": 3}', '{"weights": {}}'):
        (folder / "weights.json").write_text(broken)
        assert mixtures(read_runs([folder])) == []


def estimate(value, change=None, better="lower"):
    found = {"value": value, "low": value - 0.1, "high": value + 0.1, "n": 9}
    found |= {"metric": "loss_per_token", "better": better}
    if change is not None:
        found["change"] = {"value": change, "low": change - 0.05, "high": change + 0.05}
    return found


def test_tasks_by_stage(tmp_path):
    record = {
        "tasks": {"small": 4, "large": 40, "odd": 9},
        "left_out": ["odd"],
        "similarity": None,
        "stages": [
            {"name": "before", "estimates": {"large": estimate(2.0), "small": estimate(3.0)}},
            {"name": "all", "estimates": {
                "large": estimate(1.5, -0.5), "small": estimate(3.02, 0.02)}},
        ],
    }  # fmt: skip
    report = read_runs([tuned(tmp_path, record)])
    (found,) = staged(report)
    assert [line.task for line in found.lines] == ["large", "odd", "small"]
    assert [line.kept for line in found.lines] == [True, False, True]
    after = [line.cells[1] for line in found.lines]
    assert [cell.better for cell in after] == [True, None, None]
    assert after[1].value == "–"
    page = render(report)
    section = page[page.index('id="stages"') : page.index('id="how"')]
    assert "−0.500 [−0.550, −0.450] better" in section
    assert section.count("left out</span>") == 1


@pytest.mark.parametrize("broken", ["{", '{"stages": 3}', "[]", '{"stages": [], "tasks": {}}'])
def test_a_broken_table_says_so(tmp_path, broken):
    page = render(read_runs([tuned(tmp_path, broken)]))
    assert "stages.json cannot be read" in page
