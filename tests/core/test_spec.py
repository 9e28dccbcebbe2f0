"""Specs: one clear sentence for whatever is wrong."""

from typing import Annotated, Literal

import pytest
from pydantic import Field, ValidationError, model_validator

from deltaloom.core.errors import InputError, suggest
from deltaloom.core.spec import Spec, canonical, digest, explain, first_difference


class Inner(Spec):
    model: str
    """Hub id or local folder."""
    revision: str | None = None


class Sample(Spec):
    lr: Annotated[float, Field(gt=0)] = 0.1
    """Peak learning rate."""
    count: int | None = None
    names: list[str] = []
    kind: Literal["sum", "mean"] = "sum"
    flag: bool = False
    path: str
    """Where to write."""
    inner: Inner | None = None
    many: list[Inner] = []

    @model_validator(mode="after")
    def _rule(self):
        if self.flag and self.count is None:
            raise ValueError("flag needs count; set count")
        return self


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"lrr": 1}, "here: unknown key 'lrr'; did you mean 'lr'?"),
        (
            {"zzz": 1},
            "here: unknown key 'zzz'; known: count, flag, inner, kind, lr, many, names, path",
        ),
        ({}, "here: 'path' is missing: Where to write."),
        ({"lr": "fast"}, "here: lr = 'fast': must be a number"),
        ({"lr": [1]}, "here: lr = [1]: must be a number"),
        ({"lr": 0}, "here: lr = 0: Input should be greater than 0"),
        ({"lr": float("nan")}, "here: lr = nan: must be a finite number"),
        ({"lr": "inf"}, "here: lr = 'inf': must be a finite number"),
        ({"count": 1.5}, "here: count = 1.5: must be a whole number"),
        ({"count": "x"}, "here: count = 'x': must be a whole number"),
        ({"count": {}}, "here: count = {}: must be a whole number"),
        ({"names": "a"}, "here: names = 'a': must be a list, such as [a]"),
        ({"names": ["a", 2]}, "here: names.1 = 2: must be a text"),
        ({"kind": "max"}, "here: kind = 'max': Input should be 'sum' or 'mean'"),
        ({"flag": "maybe"}, "here: flag = 'maybe': must be true or false"),
        ({"flag": True}, "here: flag needs count; set count"),
        ({"inner": {"modle": "m"}}, "here: 'inner.model' is missing: Hub id or local folder."),
        (
            {"inner": {"model": "m", "revison": "x"}},
            "here: unknown key 'inner.revison'; did you mean 'revision'?",
        ),
        (
            {"many": [{"model": "m", "modl": "x"}]},
            "here: unknown key 'many.0.modl'; did you mean 'model'?",
        ),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(value),
)
def test_the_sentence_names_place_key_and_remedy(values, said):
    given = values if values == {} else {"path": "p", **values}
    with pytest.raises(InputError) as caught:
        Sample.parse(given, "here")
    assert str(caught.value) == said


@pytest.mark.parametrize("values", [None, [], "path", {1: 2, "path": "p"}])
def test_what_is_no_mapping_of_names_is_refused_too(values):
    with pytest.raises(InputError, match=r"^here: "):
        Sample.parse(values, "here")


def test_good_values_are_kept_and_frozen():
    made = Sample.parse({"path": "p", "lr": "0.5", "inner": {"model": "m"}}, "here")
    assert (made.lr, made.inner) == (0.5, Inner(model="m"))
    with pytest.raises(ValidationError, match="frozen"):
        made.lr = 1.0


def test_the_docstring_is_the_fields_help():
    class Given(Sample):
        lr: float = Field(0.2, description="Said in the field.")
        path: str = "p"
        """Said
        anew."""

    assert explain(Sample, "lr") == "Peak learning rate."
    assert explain(Sample, "count") == ""
    assert (explain(Given, "lr"), explain(Given, "path")) == ("Said in the field.", "Said anew.")
    schema = Given.model_json_schema()
    assert schema["properties"]["path"]["description"] == "Said\nanew."
    assert schema["$defs"]["Inner"]["properties"]["model"]["description"] == (
        "Hub id or local folder."
    )


def test_the_digest_changes_with_every_setting():
    one = Sample(path="p")
    others = [Sample(path="q"), Sample(path="p", lr=0.2), Sample(path="p", inner=Inner(model="m"))]
    assert len({spec.digest() for spec in (one, *others)}) == 4
    assert one.digest() == Sample(path="p", lr=0.1).digest()


def test_equal_values_have_one_canonical_text():
    assert canonical({"b": 1, "a": "ä"}) == '{"a":"ä","b":1}' == canonical({"a": "ä", "b": 1})
    assert digest({"b": 1, "a": 2}) == digest({"a": 2, "b": 1}) != digest({"a": 1, "b": 2})
    assert len(digest(None)) == 16


def test_the_first_difference_is_named_by_its_path():
    a = {"x": {"y": [1, 2]}, "z": 1}
    assert first_difference(a, {"x": {"y": [1, 3]}, "z": 2}, "r") == "r.x.y.1: 2 there, 3 here"
    assert first_difference(a, {"x": a["x"]}, "r") == "r.z: 1 there, None here"
    steps = [{"tune": {"lr": 1, "r": 8}}, {"merge": {"t": 0}}]
    other = [{"tune": {"lr": 2, "r": 8}}, {"merge": {"t": 1}}]
    assert first_difference(steps, other, "steps") == "steps.0.tune.lr: 1 there, 2 here"
    assert first_difference(steps, steps[:1], "steps").startswith("steps: [{'tune'")


def test_suggestions_are_close_or_everything():
    assert suggest("lorra", ["lora", "full"]) == "; did you mean 'lora'?"
    assert suggest("xyz", ["lora", "full"]) == "; known: full, lora"
    assert suggest("xyz", []) == ""
