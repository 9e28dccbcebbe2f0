"""Rows as examples: what is understood, ids that never get lost, and faults by file and line."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltaloom.core.errors import InputError
from deltaloom.core.examples import Example, Examples, parse
from deltaloom.core.spec import digest


def write(path, *items):
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    return path


def one(**row):
    return parse("d.jsonl line 3", "d", row)


def content(items):
    """Everything an example is but the place it was read from."""
    return [dataclasses.replace(item, where="") for item in items]


def refuses(message, **row):
    with pytest.raises(InputError, match=message) as caught:
        one(**row)
    assert str(caught.value).startswith("d.jsonl line 3: ")


# What a row may look like.


def test_prompt_and_completion_by_their_common_names():
    for names in [("prompt", "completion"), ("instruction", "output"), ("question", "response")]:
        found = one(**dict(zip(names, ("a", "b"), strict=True)))
        assert (found.prompt, found.completion, found.response) == ("a", "b", "b")
        assert found.extra == {}


def test_alpaca_input_joins_the_instruction():
    assert one(instruction="Add.", input="1 2", output="3").prompt == "Add.\n\n1 2"
    assert one(instruction="Add.", input="  ", output="3").prompt == "Add."
    refuses("'input' must be a text, not list", instruction="Add.", input=[1], output="3")


def test_conversations_are_messages_with_the_usual_roles():
    turns = [
        {"from": "system", "value": "s"},
        {"from": "human", "value": "a"},
        {"from": "gpt", "value": "b"},
    ]
    assert [turn["role"] for turn in one(conversations=turns).messages] == [
        "system",
        "user",
        "assistant",
    ]
    assert one(conversations=turns).messages == one(messages=turns).messages


def test_choices_take_an_index_or_a_text():
    for answer in (1, "no"):
        found = one(prompt="a", choices=["yes", "no"], answer=answer)
        assert (found.choices, found.answers, found.response) == (("yes", "no"), ("no",), "no")


def test_answers_may_be_several_and_are_texts():
    assert one(question="a", answer=[1, "one"]).answers == ("1", "one")
    assert one(question="a", answer=0).answers == ("0",)


def test_columns_of_no_use_are_kept():
    assert one(prompt="a", level=3, tags=["x"], none=None).extra == {"level": 3, "tags": ["x"]}


def test_source_is_the_rows_own_else_the_files_name():
    assert one(prompt="a").source == "d"
    assert one(prompt="a", dataset="flan").source == "flan"
    assert one(prompt="a", source="own", dataset="flan").source == "own"


def test_weights_are_numbers_of_at_least_zero():
    assert one(prompt="a", weight=2).weight == 2.0
    assert one(prompt="a", weight="0.5").weight == 0.5
    for wrong in (-1, "heavy", True, [1], float("nan"), float("inf")):
        refuses("weight = .*: must be a number of at least 0", prompt="a", weight=wrong)


# Faults.


def test_rows_with_nothing_in_them_say_what_was_looked_for():
    refuses("neither 'messages', 'prompt' nor 'text' among no fields")
    refuses(r"among \['body', 'title'\]", title="a", body="b")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": 3}, "'prompt' must be a text, not int"),
        ({"prompt": "a", "completion": ["b"]}, "'completion' must be a text, not list"),
        ({"text": {}}, "'text' must be a text, not dict"),
        ({"messages": "[]"}, "'messages' must be a list of messages, not str"),
        ({"messages": []}, "'messages' is empty"),
        ({"messages": ["hi"]}, "message 1 is not an object with role and content"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "user"}]},
            "message 2 needs 'role' and 'content'",
        ),
        ({"prompt": "a", "choices": "yes", "answer": 0}, "'choices' must be a list"),
        ({"prompt": "a", "choices": ["yes"], "answer": 0}, "'choices' must be a list of at least"),
        ({"prompt": "a", "choices": ["y", 1], "answer": 0}, "'choices' must be a text, not int"),
        ({"prompt": "a", "choices": ["y", "n"], "answer": 2}, "answer 2 is no index into 2"),
        ({"prompt": "a", "choices": ["y", "n"], "answer": -1}, "answer -1 is no index"),
        ({"prompt": "a", "choices": ["y", "n"], "answer": "x"}, "answer 'x' is neither an index"),
        ({"prompt": "a", "choices": ["y", "n"], "answer": True}, "answer True is neither"),
        ({"prompt": "a", "choices": ["y", "n"]}, "answer None is neither"),
        ({"prompt": "a", "answer": []}, "'answer' is an empty list"),
        ({"prompt": "half \ud83d a pair"}, r"holds \\ud83d, half of a surrogate pair"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_types_name_place_and_key(row, message):
    refuses(message, **row)


def test_an_empty_pool_is_refused(tmp_path):
    path = write(tmp_path / "pool.jsonl")
    with pytest.raises(InputError, match=f"^{path}: holds no rows"):
        Examples.read(path)
    (tmp_path / "pool.csv").write_text("prompt,completion\n")
    with pytest.raises(InputError, match=r"pool.csv: holds no rows"):
        Examples.read(tmp_path / "pool.csv")
    with pytest.raises(InputError, match="no data was named"):
        Examples.read([])


def test_the_line_of_a_fault_is_that_of_the_file(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text('{"prompt": "a"}\n\n\n{"prompt": 1}\n')
    with pytest.raises(InputError, match=r"d.jsonl line 4: 'prompt' must be a text"):
        Examples.read(path)


# Ids.


def test_ids_are_the_content_and_nothing_else():
    first = one(prompt="a", completion="b")
    assert first.id == digest({"prompt": "a", "completion": "b"})
    assert parse("elsewhere", "other", {"output": "b", "instruction": "a", "n": 1}).id == first.id
    assert one(prompt="a", completion="c").id != first.id


def test_given_ids_are_kept_as_texts():
    assert [one(id=given, prompt="a").id for given in ("x", 7, 0)] == ["x", "7", "0"]
    assert one(id="", prompt="a").id == one(prompt="a").id


def test_a_given_id_used_twice_names_both_places(tmp_path):
    a = write(tmp_path / "a.jsonl", {"id": "x", "prompt": "p"})
    b = write(tmp_path / "b.jsonl", {"id": "y", "prompt": "p"}, {"id": "x", "prompt": "q"})
    with pytest.raises(
        InputError, match=r"b.jsonl line 2: id 'x' was already used at .*a.jsonl line 1; make ids"
    ):
        Examples.read([a, b])


def test_equal_rows_without_ids_are_numbered(tmp_path):
    row = {"prompt": "a", "completion": "b"}
    path = write(tmp_path / "d.jsonl", row, {"prompt": "c", "completion": "d"}, row, row)
    first, _, *others = Examples.read(path).ids
    assert others == [f"{first}-2", f"{first}-3"]


def test_a_pool_read_together_with_its_own_copy_keeps_ids_unique(tmp_path):
    row = {"prompt": "a", "completion": "b"}
    pool = write(tmp_path / "pool.jsonl", row, row)
    Examples.read(pool).write(tmp_path / "copy.jsonl")
    ids = Examples.read([tmp_path / "copy.jsonl", pool]).ids
    assert len(ids) == len({*ids}) == 4


# Collections.


def test_a_slice_and_a_take_are_examples(tmp_path):
    data = Examples.read(write(tmp_path / "d.jsonl", *({"id": i, "prompt": "p"} for i in range(5))))
    assert isinstance(data[1:3], Examples)
    assert data[1:3].ids == ["1", "2"]
    assert data.take([4, 0]).ids == ["4", "0"]
    assert data[-1].id == "4"
    assert len(data) == 5


def test_sources_are_counted(tmp_path):
    path = write(tmp_path / "d.jsonl", {"prompt": "a"}, {"prompt": "b", "source": "s"})
    assert Examples.read(path).sources() == {"d": 1, "s": 1}


def test_the_digest_sees_every_row_and_the_order():
    rows = [one(id=i, prompt=f"p{i}") for i in range(3)]
    changed = [*rows[:2], dataclasses.replace(rows[2], weight=1.0)]
    digests = {Examples(items).digest() for items in (rows, rows[::-1], rows[:2], changed)}
    assert len(digests) == 4


TEXTS = st.text(max_size=8)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": TEXTS}),
    min_size=1,
    max_size=3,
)
JSON = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS
EXTRA = st.dictionaries(st.sampled_from(["level", "tags", "output", "ä"]), JSON, max_size=2)
ROW = st.one_of(
    st.fixed_dictionaries({"prompt": TEXTS, "completion": TEXTS}),
    st.fixed_dictionaries({"messages": MESSAGES}, optional={"answer": TEXTS}),
    st.fixed_dictionaries({"text": TEXTS}),
    st.fixed_dictionaries({"question": TEXTS, "answer": st.lists(TEXTS, min_size=1, max_size=3)}),
    st.fixed_dictionaries(
        {"prompt": TEXTS, "choices": st.lists(TEXTS, min_size=2, max_size=4)}
        | {"answer": st.integers(0, 1)},
        optional={"group": TEXTS, "weight": st.floats(0, 9), "source": TEXTS},
    ),
)


@given(st.lists(st.tuples(EXTRA, ROW), min_size=1, max_size=4))
def test_writing_and_reading_gives_equal_examples(tmp_path, drawn):
    rows = []
    for k, (extra, row) in enumerate(drawn):
        clash = {"output"} if "prompt" in row or "question" in row else set()
        kept = {key: value for key, value in extra.items() if key not in clash}
        rows.append(parse(f"d line {k}", "d", {**kept, **row}))
        rows[-1] = dataclasses.replace(rows[-1], id=f"{rows[-1].id}.{k}")
    first = Examples(rows)
    first.write(tmp_path / "d.jsonl")
    second = Examples.read(tmp_path / "d.jsonl")
    assert content(second) == content(first)
    assert second.digest() == first.digest()


def test_written_columns_come_back_beside_the_rows(tmp_path):
    data = Examples([one(id="a", prompt="p"), one(id="b", prompt="\u2028")])
    data.write(tmp_path / "d.jsonl", {"score": {"a": 0.5}})
    assert [item.extra for item in Examples.read(tmp_path / "d.jsonl")] == [{"score": 0.5}, {}]


def test_an_example_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        one(prompt="a").prompt = "b"
    assert isinstance(one(prompt="a"), Example)
