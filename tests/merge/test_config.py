"""mergekit's YAML as found in the wild, and what is said about faults in it."""

import os
from pathlib import Path

import pytest

from deltaloom.core.errors import InputError
from deltaloom.merge._checked import check
from deltaloom.merge._config import Reference, parse_config, read_config

ASSETS = Path(os.environ.get("DELTALOOM_ASSETS", "/none")) / "mergekit_yaml"
TWO = {"merge_method": "linear", "models": [{"model": "a"}, {"model": "b"}]}


def checked(text, tmp_path):
    (tmp_path / "c.yml").write_text(text)
    return [check(one, "c.yml") for one in read_config(tmp_path / "c.yml")]


@pytest.mark.skipif(not ASSETS.is_dir(), reason="DELTALOOM_ASSETS is not set")
def test_files_in_the_wild():
    faults = {
        "wild_13_invalid_slerp_no_base_two_t.yml": "t is missing.*models.0..parameters",
        "wild_14_invalid_unknown_keys.yml": "base_model is missing.*ties.*density.*parameters",
    }
    files = sorted(ASSETS.glob("*.yml"))
    assert len(files) > 20
    for file in files:
        if file.name in faults:
            with pytest.raises(InputError, match=faults[file.name]):
                [check(one, str(file)) for one in read_config(file)]
        else:
            assert [check(one, str(file)) for one in read_config(file)]


@pytest.mark.parametrize(
    ("text", "model", "lora"),
    [
        ("a/b", ("a/b", None), None),
        ("a/b@v1", ("a/b", "v1"), None),
        ("a@v1+c/d@v2", ("a", "v1"), ("c/d", "v2")),
        ({"model": {"path": "a", "revision": "v"}, "lora": "c"}, ("a", "v"), ("c", None)),
    ],
)
def test_references(text, model, lora):
    (found,) = parse_config({"merge_method": "x", "models": [{"model": text}]}, "c").references()
    assert isinstance(found, Reference)
    assert (found.model.path, found.model.revision) == model
    assert (found.lora and (found.lora.path, found.lora.revision)) == lora


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"models": None}, "exactly one of models, slices and modules"),
        ({"merge_method": None}, "merge_method"),
        ({"models": [{"model": "a+b+c"}]}, "more than one '\\+'"),
        ({"models": [{"model": "a@b@c"}]}, "more than one '@'"),
        ({"dtype": "bfloat"}, "dtype.*did you mean 'bfloat16'"),
        ({"parameters": {"weight": {"a": 1}}}, "value"),
        ({"parameters": {"weight": [1, [2]]}}, "a list of numbers"),
        ({"tokenizer": {}, "tokenizer_source": "base"}, "not both"),
        ({"models": None, "slices": [{"sources": []}]}, "sources is empty"),
        (
            {"models": None, "slices": [{"sources": [{"model": "a", "layer_range": [3, 3]}]}]},
            "holds no layers",
        ),
    ],
)
def test_faults_are_named(change, fault):
    with pytest.raises(InputError, match=fault) as error:
        parse_config({**TWO, **change}, "c.yml")
    assert str(error.value).startswith("c.yml: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("{models: [{model: a}], merge_method: tise, base_model: b}", "did you mean 'ties'"),
        ("{models: [{model: a}], merge_method: linear}", r"models\[0\] \(a\) has no .*weight"),
        (
            "{models: [{model: a}], merge_method: ties, base_model: b, parameters: {weight: x}}",
            "weight = 'x': must be a number",
        ),
        (
            "{models: [{model: a}], merge_method: slerp, base_model: b, parameters: {t: [0, 2]}}",
            "t = 2",
        ),
        (
            "{models: [{model: a}, {model: b}], merge_method: passthrough}",
            "passthrough needs 1 model; got 2",
        ),
        ("{models: [{model: a}, {model: a}], merge_method: karcher}", "lists a again"),
        (
            "{models: [{model: a}], merge_method: karcher, tokenizer: {pad_to_multiple_of: 0}}",
            "tokenizer.pad_to_multiple_of .* 1",
        ),
        ("{models: [{model: a}], merge_method: karcher, chat_template: chatml}", "chat_template"),
        ("{models: [{model: a}], merge_method: karcher, tokenizer_source: base}", "needs base_mod"),
        ("a: [", "line 1: not YAML"),
        ("", "is empty"),
        (
            "{models: [{model: a}], merge_method: karcher}\n---\n"
            "{models: [{model: a}], merge_method: karcher}",
            "c.yml document 1: 'name' is missing",
        ),
    ],
)
def test_merges_that_cannot_be(text, fault, tmp_path):
    with pytest.raises(InputError, match=fault):
        checked(text, tmp_path)


def test_unknown_keys_are_noted(tmp_path):
    text = (
        "{models: [{model: a, weight: 1, parameters: {weight: 1}}], merge_method: ties,"
        " base_model: b, parameters: {nomalize: false}, optimization: {x: 1}, dtyp: float16}"
    )
    (one,) = checked(text, tmp_path)
    notes = "\n".join(one.notes)
    assert "'models[0].weight'" in notes
    assert "'optimization'" in notes
    assert "'dtyp' is ignored; did you mean 'dtype'?" in notes
    assert "parameters.nomalize" in notes
    assert "did you mean 'normalize'?" in notes
