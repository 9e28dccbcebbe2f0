"""Comparing runs: what is paired with what, seeds, corrections and the items still needed."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from deltaloom.core.atomic import write_json
from deltaloom.core.errors import InputError
from deltaloom.core.estimate import Estimate, compare, compare_seeds, holm, items_needed
from deltaloom.core.run import Run
from deltaloom.recipe.comparing import compared


def measured(folder, tasks):
    """A run that measured the base on tasks with these items."""
    found = {}
    with Run.open(folder, {"steps": []}, {}, 0) as run:
        for task, values in tasks.items():
            items = {f"i{k}": float(value) for k, value in enumerate(values)}
            found[task] = Estimate.from_items(items, metric="score", of=f"base on {task}")
            write_json(run.part(f"base--{task}").folder / "estimate.json", found[task].to_json())
        run.finish()
    return found


@pytest.fixture
def runs(tmp_path):
    rng = np.random.default_rng(0)
    shifts = {"arc": 0.8, "gsm": 0.15, "mmlu": 0.0}
    shared = {task: rng.normal(size=60) for task in shifts}
    made = {}
    for side, sign in (("a", 1), ("b", 0)):
        for seed in range(3):
            tasks = {
                task: shared[task] + sign * shift + 0.5 * rng.normal(size=60)
                for task, shift in shifts.items()
            }
            made[side, seed] = measured(tmp_path / f"{side}{seed}", tasks)
    return tmp_path, made


def test_tasks_are_corrected_for_one_another(runs):
    folder, made = runs
    found = compared(str(folder / "a0"), str(folder / "b0"))
    assert list(found) == ["base/arc/score", "base/gsm/score", "base/mmlu/score"]
    p = [compare(made["a", 0][t], made["b", 0][t]).p_value for t in ("arc", "gsm", "mmlu")]
    assert [one.p_holm for one in found.values()] == pytest.approx(holm(p))
    assert [one.p_bh for one in found.values()] == pytest.approx(stats.false_discovery_control(p))
    assert "p_holm=" in str(found["base/arc/score"])
    assert found["base/arc/score"].needed is None  # found already
    undecided = found["base/mmlu/score"]
    assert undecided.needed == items_needed(
        undecided.result.difference.value, pilot=undecided.result
    )
    assert f"{undecided.needed} items would find" in str(undecided)
    assert undecided.to_json()["items_needed"] == undecided.needed


def test_runs_with_commas_between_are_seeds(runs):
    folder, made = runs
    sides = [",".join(str(folder / f"{side}{seed}") for seed in range(3)) for side in "ab"]
    found = compared(*sides)["base/arc/score"]
    wanted = compare_seeds(
        [made["a", k]["arc"] for k in range(3)],
        [made["b", k]["arc"] for k in range(3)],
        items="random",
    )
    assert found.result.difference.stderr == wanted.difference.stderr
    assert (found.result.unit, found.result.difference.interval) == ("seeds", "seeds-items-t")
    assert found.needed is None
    assert "3 seeds" in str(found)


def test_one_task_needs_no_correction(tmp_path):
    for name in "ab":
        measured(tmp_path / name, {"arc": [0.0, 1.0, 0.5]})
    (found,) = compared(str(tmp_path / "a"), str(tmp_path / "b")).values()
    assert (found.p_holm, found.needed) == (None, None)  # nor is a difference of zero looked for
    assert "p_holm" not in str(found)


def test_a_folder_may_have_a_comma_in_its_name(tmp_path):
    for name in ("a,1", "b"):
        measured(tmp_path / name, {"arc": [0.0, 1.0, 0.5]})
    assert compared(str(tmp_path / "a,1"), str(tmp_path / "b"))


def test_what_is_refused(runs, tmp_path):
    folder, _ = runs
    with pytest.raises(InputError, match="2 and 1 runs"):
        compared(f"{folder / 'a0'},{folder / 'a1'}", str(folder / "b0"))
    measured(tmp_path / "other", {"squad": [1.0, 2.0]})
    with pytest.raises(InputError, match="no task by the same metric"):
        compared(str(folder / "a0"), str(tmp_path / "other"))
