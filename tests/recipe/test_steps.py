"""What a recipe may say, and the sentence for what it may not."""

import pytest

from deltaloom.core.errors import InputError
from deltaloom.recipe.parsing import parse_recipe, parse_step, read_yaml
from deltaloom.recipe.schema import recipe_schema


def recipe(*steps, **head):
    return {"base": "org/model", "steps": list(steps), **head}


LOSS = {"method": "loss", "deltas": ["org/a"], "tasks": "t.jsonl"}
TUNE = {"tune": {"method": "lora", "data": "rows.jsonl", "name": "skill"}}


def test_steps_inherit_base_and_seed_and_keep_their_own():
    steps = parse_recipe(
        recipe(TUNE, {"tune": {"method": "full", "data": "d.jsonl", "base": "org/other"}}, seed=7),
        "r",
    ).steps
    assert [one.step.base.model for one in steps] == ["org/model", "org/other"]
    assert [one.step.seed for one in steps] == [7, 7]
    assert [one.step.name for one in steps] == ["skill", "tune-full"]


def test_one_name_stands_for_a_list_and_a_text_for_a_base():
    step = parse_step(
        "merge", {"method": "ties", "base": "org/model", "deltas": "org/lora"}, "merge ties"
    )
    assert step.step.deltas == ["org/lora"]
    assert step.step.base.dtype == "auto"


def test_an_earlier_step_goes_before_a_folder_of_its_name(tmp_path, monkeypatch):
    """The shell's `out=chosen` beside a recipe whose step has that name, as the README has it."""
    monkeypatch.chdir(tmp_path)
    for name in ("chosen", "skill", "base"):
        (tmp_path / name).mkdir()
    found = parse_recipe(
        recipe(
            {"select": {"method": "random", "pool": "chosen", "count": 1, "name": "chosen"}},
            {"tune": {"method": "full", "data": ["chosen", "./chosen"], "name": "skill"}},
            {
                "measure": {
                    "method": "judge",
                    "base": "skill",
                    "deltas": ["base", "skill"],
                    "tasks": "t.jsonl",
                    "judge": "skill",
                }
            },
        ),
        "r",
    ).steps
    folder = str(tmp_path / "chosen")
    assert found[0].step.pool == [folder]
    assert found[1].step.data == ["chosen", folder]
    assert found[2].step.base.model == "skill"
    assert found[2].step.deltas == ["base", "skill"]
    assert found[2].method.judge.model == "skill"


def test_presets_are_defaults_that_settings_override():
    values = {"method": "ties", "base": "b/m", "deltas": ["a/a", "c/c"]}
    assert parse_step("merge", values, "x").method.density == 0.2
    assert parse_step("merge", {**values, "density": 0.7}, "x").method.density == 0.7
    assert parse_step("merge", {**values, "density": 0.7}, "x").method.consensus is True


def test_overrides_reach_steps_nested_settings_and_the_head():
    less = {"select": {"method": "less", "pool": "p.jsonl", "target": "t.jsonl", "name": "chosen"}}
    found = parse_recipe(
        recipe(less, TUNE),
        "r",
        {
            "skill.lr": "1e-3",
            "chosen.warmup.r": 4,
            "base.dtype": "bfloat16",
            "seed": 3,
        },
    ).steps
    assert found[1].method.lr == 1e-3
    assert found[0].method.warmup.r == 4
    assert found[0].method.warmup.alpha == 512.0
    assert found[1].step.base.dtype == "bfloat16"
    assert found[1].step.base.model == "org/model"
    assert found[0].step.seed == 3


def test_a_recorded_recipe_parses_to_itself():
    first = parse_recipe(recipe(TUNE), "r")
    assert parse_recipe(first.record(), "r") == first


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ([], "a recipe is a mapping with a list of 'steps'"),
        ({"stesp": [], "steps": []}, "unknown key 'stesp'; did you mean 'steps'?"),
        (recipe({"tun": {}}), "no verb 'tun'; did you mean 'tune'?"),
        (
            recipe({"tune": {"data": "d"}}),
            "'method' is missing; known: clear, composite",
        ),
        (recipe({"tune": {"method": "lroa"}}), "no tune method 'lroa'; did you mean 'lora'?"),
        (recipe({"tune": {"method": "ties"}}), "no tune method 'ties'; did you mean `merge ties`?"),
        (recipe({"tune": {"method": "lora"}}), "'data' is missing: Files, folders"),
        (recipe({"tune": {**TUNE["tune"], "data": []}}), "data = []: must have 1 or more"),
        (recipe({"tune": {**TUNE["tune"], "seed": -1}}), "seed = -1: Input should be greater than"),
        (recipe({"tune": {**TUNE["tune"], "epochs": "inf"}}), "epochs = 'inf': must be a finite"),
        (
            recipe({"tune": {**TUNE["tune"], "learning": 1}}),
            "unknown key 'learning'",
        ),
        (recipe({"tune": {**TUNE["tune"], "epoch": 1}}), "did you mean 'epochs'?"),
        (recipe({"tune": {**TUNE["tune"], "lr": "fast"}}), "lr = 'fast': must be a number"),
        (recipe({"tune": {**TUNE["tune"], "lr": -1}}), "lr = -1"),
        (
            recipe({"tune": {**TUNE["tune"], "batch_size": 8, "micro_batch": 3}}),
            "micro_batch = 3 does not divide batch_size = 8",
        ),
        (recipe(TUNE, TUNE), "step skill: two steps have this name"),
        ({"steps": [TUNE]}, "base= is missing"),
        (
            recipe({"select": {"method": "less", "pool": "p.jsonl"}}),
            "less needs target=",
        ),
        (recipe({"tune": 3}), "tune needs a mapping of settings"),
        (recipe(), "recipe.yaml: has no steps"),
        (recipe({"tune": {**TUNE["tune"], "name": "../skill"}}), "is that of its folder"),
        (recipe({"tune": {**TUNE["tune"], "name": ".work"}}), "is that of its folder"),
        (recipe({"tune": {**TUNE["tune"], "name": "base"}}), "give the step another name"),
        (
            recipe({"tune": {**TUNE["tune"], "name": "first", "base": "skill"}}, TUNE),
            "step first: base = 'skill' is made by this step or a later one",
        ),
        (
            recipe({"tune": {**TUNE["tune"], "evaluate": "skill"}}),
            "step skill: evaluate = 'skill' is made by this step or a later one",
        ),
        (recipe({"measure": {**LOSS, "compare": "bse"}}), "compare = 'bse' is not measured here"),
        (recipe({"measure": {**LOSS, "deltas": ["a/x", "b/x"]}}), "deltas have the same last name"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(content, sentence):
    with pytest.raises(InputError) as error:
        parse_recipe(content, "recipe.yaml")
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_an_override_of_nothing_is_refused():
    with pytest.raises(InputError, match="no step or recipe key 'skil'; did you mean 'skill'"):
        parse_recipe(recipe(TUNE), "r", {"skil.lr": 1})


def test_yaml_errors_name_the_line(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("base: x\nsteps:\n  - tune: {method: lora\n")
    with pytest.raises(InputError, match=r"r\.yaml line 4: not YAML"):
        read_yaml(path)
    with pytest.raises(InputError, match="no such file"):
        read_yaml(tmp_path / "absent.yaml")


def test_a_key_given_twice_and_another_encoding_are_refused(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("base: x\nsteps:\n  - tune: {method: lora, lr: 1e-3,\n      lr: 2e-3}\n")
    with pytest.raises(InputError, match=r"r\.yaml line 4: .*the key 'lr' is given twice"):
        read_yaml(path)
    path.write_text("a: &a {x: 1}\nb: {<<: *a, x: 2}\n")
    assert read_yaml(path)["b"] == {"x": 2}
    path.write_bytes("base: x".encode("utf-16"))
    with pytest.raises(InputError, match=r"r\.yaml: not UTF-8 text"):
        read_yaml(path)


def test_yaml_cannot_make_objects(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("steps: !!python/object/apply:os.system ['touch owned']\n")
    with pytest.raises(InputError, match="not YAML"):
        read_yaml(path)


def test_the_schema_knows_every_method_and_its_texts():
    schema = recipe_schema()
    steps = schema["properties"]["steps"]["items"]["anyOf"]
    bodies = [next(iter(step["properties"].values())) for step in steps]
    names = {body["properties"]["method"]["const"] for body in bodies}
    assert {"less", "lora", "ties", "choice"} <= names
    ties = next(b for b in bodies if b["properties"]["method"]["const"] == "ties")
    assert ties["properties"]["density"]["default"] == 0.2
    assert all("description" in one or "anyOf" in one for one in ties["properties"].values())


def test_who_works_is_no_part_of_what_is_done(tmp_path):
    values = {"method": "random", "pool": "p.jsonl", "count": 2}
    alone, many = (
        parse_step("select", {**values, **more}, "select random")
        for more in ({}, {"workers": 3, "cluster": "local"})
    )
    assert many.step.workers == 3
    assert alone.record() == many.record()
    with pytest.raises(InputError, match="unknown key 'workers'"):
        parse_step("merge", {"method": "average", "deltas": ["a"], "workers": 2}, "merge average")


def test_a_merge_without_its_inputs_or_with_one_it_never_reads_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"average needs deltas=.*Adapter or model folders"):
        parse_step("merge", {"method": "average", "base": str(tmp_path)}, "recipe")
    values = {"method": "average", "base": str(tmp_path), "deltas": ["a"], "data": ["d.jsonl"]}
    with pytest.raises(InputError, match="average makes no use of data=; leave it out"):
        parse_step("merge", values, "recipe")
