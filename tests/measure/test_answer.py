import json

import pytest
import torch
from pydantic import ValidationError

from deltaloom.core.errors import InputError
from deltaloom.core.examples import Examples
from deltaloom.core.method import Sizes
from deltaloom.core.registry import get
from deltaloom.measure.answer import Answer, normalised

QUESTIONS = ("what is the capital ?", "w1 w2", "the city of", "a", "w5 w6 w7 w8 w9")


def greedy(model, tokenizer, text, new=64, chat=False):
    exact = type(model)(model.config).double().eval()
    exact.load_state_dict({k: v.double() for k, v in model.state_dict().items()})
    ids = tokenizer(text, add_special_tokens=not chat)["input_ids"]
    start = len(ids)
    while len(ids) < start + new:
        with torch.no_grad():
            ids.append(int(exact(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


@pytest.fixture
def outputs(tiny):
    return [greedy(tiny.model, tiny.tokenizer, text, 6) for text in QUESTIONS]


def measure(tiny, data, run, **fields):
    return Answer(max_new_tokens=6, **fields).measure(tiny.model, tiny.tokenizer, data, run)


def kept(run):
    text = (run.folder / "generations.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_right_where_the_plain_loop_says_so(tiny, rows, run, outputs):
    answers = [[outputs[0], "no"], "wrong", ["wrong", f" {outputs[2]} "], "b", outputs[4]]
    data = rows(*({"prompt": q, "answer": a} for q, a in zip(QUESTIONS, answers, strict=True)))
    found = measure(tiny, data, run, match="exact")
    assert [found.items[key] for key in data.ids] == [1.0, 0.0, 1.0, 0.0, 1.0]
    assert (found.metric, found.better, found.interval) == ("exact_match", "higher", "wilson")
    lines = kept(run)
    assert [line["id"] for line in lines] == data.ids
    assert [line["output"] for line in lines] == outputs
    assert [line["correct"] for line in lines] == [True, False, True, False, True]
    assert lines[0]["prompt_tail"].endswith(QUESTIONS[0])
    assert lines[0]["answers"] == answers[0]
    assert not list(run.folder.glob("*.part"))


def test_same_bytes_again(tiny, rows, run):
    data = rows(*({"prompt": q, "answer": "b"} for q in QUESTIONS))
    first = measure(tiny, data, run)
    text = (run.folder / "generations.jsonl").read_bytes()
    assert measure(tiny, data, run).to_json() == first.to_json()
    assert (run.folder / "generations.jsonl").read_bytes() == text


def test_cost(tiny, rows, run):
    found = measure(tiny, rows({"prompt": "w1 w2", "answer": "b"}), run, stop=["nowhere"])
    seen = len(kept(run)[0]["output"].split())
    assert found.cost["forward_tokens"] == 3 + seen - 1 + (seen < 6)  # eos was generated too
    assert run.record["cost"]["flops"] == found.cost["flops"] > 0


def test_stop_texts(tiny, rows, run, outputs):
    words = outputs[0].split()
    data = rows({"prompt": QUESTIONS[0], "answer": "x"})
    measure(tiny, data, run, stop=[f"{words[1]} {words[2]}"])
    assert kept(run)[0]["output"] == f"{words[0]} "


def test_conversation_and_completion_as_answers(tiny, rows, run):
    chat = [{"role": "user", "content": "what is a ?"}]
    wanted = greedy(tiny.model, tiny.tokenizer, "user: what is a ? assistant: ", 6, chat=True)
    data = rows(
        {"messages": [*chat, {"role": "assistant", "content": wanted}]},
        {"messages": chat, "answer": wanted},
        {"prompt": "a", "completion": greedy(tiny.model, tiny.tokenizer, "a", 6)},
        {"prompt": "a", "choices": ["no", greedy(tiny.model, tiny.tokenizer, "a", 6)], "answer": 1},
    )
    assert measure(tiny, data, run, match="exact").value == 1.0


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("The  Eiffel Tower!", "eiffel tower"),
        ("a An THE", ""),
        ("don't", "dont"),
        ("theatre, a", "theatre"),
        ("U.S.A.", "usa"),
        ("“quoted”", "“quoted”"),
    ],
)
def test_squad_normalisation(text, wanted):
    assert normalised(text) == wanted


def judge(output, answers, rows, **fields):
    listed = answers if isinstance(answers, list) else [answers]
    example = rows({"prompt": "q", "answer": listed})[0]
    return Answer(**fields)._judge(example, example.answers)(output)


@pytest.mark.parametrize(
    ("output", "answers", "right"),
    [
        ("The Paris.", "paris", True),
        ("Paris, France", "paris", False),
        ("paris", ["London", "Paris"], True),
    ],
)
def test_normalised(output, answers, right, rows):
    assert judge(output, answers, rows) is right


@pytest.mark.parametrize(
    ("output", "right"),
    [("It is Paris, France!", True), ("comparison", False), ("in the pari s", False)],
)
def test_contains_whole_words(output, right, rows):
    assert judge(output, "Paris", rows, match="contains") is right


NUMBER = r"#### (-?[\d.,]+)"


@pytest.mark.parametrize(
    ("output", "answer", "right"),
    [
        ("so #### 1,000 done", "It is #### 1000", True),
        ("#### 72", "72", True),
        ("#### 72.0", "72", True),
        ("#### -72", "72", False),
        ("72", "72", False),  # the output has no match
        ("#### 1 #### 2", "1", True),
    ],
)
def test_regex(output, answer, right, rows):
    assert judge(output, answer, rows, match="regex", pattern=NUMBER) is right


def test_regex_last_match_and_no_group(rows):
    fields = {"match": "regex", "pattern": r"\d+"}
    assert not judge("1 then 2", "2", rows, **fields)
    assert judge("1 then 2", "2", rows, **fields, take="last")


def test_settings_are_checked():
    for wrong in (
        {"match": "regex"},
        {"pattern": "x"},
        {"match": "regex", "pattern": "("},
        {"stop": ["a", ""]},
        {"max_new_tokens": 0},
    ):
        with pytest.raises(ValidationError):
            Answer(**wrong)
    with pytest.raises(InputError, match=r"measure answer: .* no regular expression"):
        get("measure", "answer").make({"match": "regex", "pattern": "("})


def test_bad_input(tiny, rows, run):
    with pytest.raises(InputError, match="holds no rows"):
        measure(tiny, Examples([], "empty"), run)
    with pytest.raises(InputError, match=r"q.jsonl line 1: has no 'answer'"):
        measure(tiny, rows({"prompt": "a"}), run)
    with pytest.raises(InputError, match=r"q.jsonl line 1: nothing is left of answer 'The'"):
        measure(tiny, rows({"prompt": "a", "answer": "The"}), run)
    with pytest.raises(InputError, match="max_new_tokens = 64"):
        Answer().measure(tiny.model, tiny.tokenizer, rows({"prompt": "a", "answer": "b"}), run)
    assert not (run.folder / "generations.jsonl").exists()


def test_left_cut_and_unfinished_are_noted(tiny, rows, run):
    data = rows({"prompt": " ".join(["w1"] * 80), "answer": "b"}, {"prompt": "w1", "answer": "b"})
    measure(tiny, data, run)
    assert run.record["notes"]["truncated_rows"] == 1
    assert 0 <= run.record["notes"]["unfinished_outputs"] <= 2


def test_clusters(tiny, rows, run):
    data = rows(*({"prompt": q, "answer": "b", "cluster": q[0]} for q in QUESTIONS))
    assert len(set(measure(tiny, data, run).clusters.values())) == 3


def test_parts_of_a_run_keep_their_own(tiny, rows, run):
    data = rows({"prompt": "w1", "answer": "b"})
    for name in ("base--city", "skill--city"):
        measure(tiny, data, run.part(name))
        assert (run.folder / name / "generations.jsonl").exists()
        assert run.record["notes"][f"{name}.truncated_rows"] == 0
    assert not (run.folder / "generations.jsonl").exists()


def test_plan():
    sizes = Sizes(100, 30.0, 0, 1000, 1200, 100, 4800, 0)
    assert Answer(max_new_tokens=10).work(sizes).forward_tokens == 4000.0
