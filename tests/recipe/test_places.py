"""Settings that name a file, a folder or an earlier step: made absolute, resolved, hashed."""

import json
from pathlib import Path
from typing import Annotated, get_args

import pytest
import tiny

from deltaloom.core.base import Base, BaseField
from deltaloom.core.places import PLACE, fingerprint, moved, places
from deltaloom.core.registry import methods
from deltaloom.core.run import Run
from deltaloom.core.spec import Spec
from deltaloom.engine.endpoint import Endpoint
from deltaloom.recipe.execute import run_recipe
from deltaloom.recipe.parsing import parse_recipe, parse_step


class Settings(Spec):
    one: Annotated[str | None, PLACE] = None
    many: Annotated[list[str], PLACE] = []
    base: Annotated[BaseField | None, PLACE] = None
    who: Annotated[Endpoint | None, PLACE] = None
    words: str = "one"


def test_every_name_is_told_and_changed():
    given = Settings(one="a", many=["a", "b"], base="c", who=Endpoint(url="http://a/v1", model="a"))
    assert [*places(given)] == [("one", "a"), ("many", "a"), ("many", "b"), ("base", "c")]
    found = moved(given, {"a": "A", "c": "C"}.get)
    assert (found.one, found.many, found.base.model) == ("A", ["A", None], "C")
    assert (found.who, found.words) == (given.who, "one")
    # What stays as it was is not said to be given: a search's choice may still set it.
    assert moved(Settings(words="a"), str.upper).model_fields_set == {"words"}


def models_in(kind):
    """Whether an annotation holds a Base."""
    return kind is Base or any(map(models_in, get_args(kind)))


@pytest.mark.parametrize("entry", methods(), ids=lambda entry: f"{entry.verb}-{entry.name}")
def test_settings_that_are_models_are_places(entry):
    for key, field in entry.load().model_fields.items():
        if models_in(field.annotation):
            assert PLACE in field.metadata, f"{key} of {entry.verb} {entry.name}"


def test_fingerprints_are_of_content(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name / "inner").mkdir(parents=True)
        (tmp_path / name / "inner" / "rows.jsonl").write_text("{}\n")
        (tmp_path / name / "run.json").write_text(name)
        (tmp_path / name / ".work").write_text(name)
    assert fingerprint(tmp_path / "a") == fingerprint(tmp_path / "b")
    (tmp_path / "b" / "inner" / "rows.jsonl").write_text("{} \n")
    assert fingerprint(tmp_path / "a") != fingerprint(tmp_path / "b")
    base = tiny.base_in(tmp_path / "base")
    assert fingerprint(base) == Base(model=str(base)).fingerprint()


def test_local_paths_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.base_in(tmp_path / "base")
    values = {"method": "judge", "tasks": "x.jsonl", "judge": "base", "name": "m"}
    assert parse_step("measure", values, "m").method.judge.model == str(tmp_path / "base")
    values = {"method": "conditional", "base": "org/model", "data": "d", "scorer": "org/other"}
    assert parse_step("tune", values, "t").method.scorer == "org/other"


def test_a_folder_here_does_not_hide_the_step_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("chosen", "skill", "rows.jsonl"):
        (tmp_path / name).mkdir()
    tune = {"method": "lora", "data": ["chosen", "rows.jsonl"], "evaluate": "chosen"}
    steps = [
        {"select": {"method": "random", "pool": "chosen", "name": "chosen"}},
        {"tune": {**tune, "name": "skill"}},
        {"tune": {"method": "prompt", "data": "rows.jsonl", "start": "skill", "name": "again"}},
        {"merge": {"method": "ties", "deltas": ["skill", "again"], "name": "both"}},
        {"select": {"method": "delift", "pool": "rows.jsonl", "given": "chosen"}},
    ]
    first, skill, again, both, more = parse_recipe({"base": "org/b", "steps": steps}, "r").steps
    assert first.step.pool == [str(tmp_path / "chosen")]  # no step before it has the name
    assert skill.step.data == ["chosen", str(tmp_path / "rows.jsonl")]
    assert skill.step.evaluate.data == ["chosen"]
    assert (again.method.start, both.step.deltas) == ("skill", ["skill", "again"])
    assert more.method.given == "chosen"


def test_a_setting_names_an_earlier_step(tmp_path):
    base = tiny.base_in(tmp_path / "base")
    data = tiny.rows_in(tmp_path / "rows.jsonl", 8)
    tasks = tmp_path / "pairs.jsonl"
    pairs = [
        {"prompt": f"{k} ?", "output_1": "tom", "output_2": "rome", "label": 1 + k % 2}
        for k in range(4)
    ]
    tasks.write_text("".join(json.dumps(one) + "\n" for one in pairs))
    steps = [
        {"tune": {"method": "full", "data": str(data), "name": "teacher", "epochs": 1}},
        {"measure": {"method": "judge", "tasks": str(tasks), "judge": "teacher", "name": "said"}},
    ]
    out = tmp_path / "out"
    recipe = parse_recipe({"base": str(base), "steps": steps}, "recipe")
    estimates = run_recipe(recipe, out)["results"]["estimates"]
    assert [*estimates] == ["base/pairs/judge_accuracy"]
    record = Run.read(out / "said")
    teacher = Base(model=str(out / "teacher")).fingerprint()
    assert record["inputs"]["judge teacher"] == teacher != Base(model=str(base)).fingerprint()
    (said,) = record["recipe"]["steps"]
    assert said["measure"]["judge"]["model"] == "teacher"  # as the recipe says it
    text = (out / "said" / "recipe.yaml").read_text()
    assert str(Path(out / "teacher")) in text  # replays alone
