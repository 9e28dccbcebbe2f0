"""Recall, needles, indicator and steering against what can be said by hand."""

import json

import numpy as np
import pytest
import torch

from deltaloom.core.errors import InputError
from deltaloom.core.estimate import Estimate
from deltaloom.measure._needle import hidden
from deltaloom.measure.context import Context

ROWS = (
    {"id": "a", "prompt": "what is the capital of France ?", "answer": "the city of Paris"},
    {"id": "b", "prompt": "w1 w2 w3 ?", "answer": ["w4", "a w5 w6"]},
    {"id": "c", "messages": [{"role": "user", "content": "w7 city"}], "answer": "b c"},
)


def read(run):
    return json.loads((run.folder / "attention.json").read_text())


def measured(tiny, data, run, **settings):
    method = Context(max_new_tokens=6, **settings)
    return method.measure(tiny.model, tiny.tokenizer, data, run)


def test_recall_counts_the_answers_words_in_the_output(tiny, rows, run, monkeypatch):
    from deltaloom.engine import generate

    def fixed(model, tokenizer, prompts, *args, **options):
        texts = ["Paris is a city, Paris!", "w6 w9 w5", "c b"]
        return [generate.Generated(text, 3, 2, False, True) for text in texts]

    monkeypatch.setattr(generate, "generate_greedily", fixed)
    data = rows(*ROWS)
    recall = measured(tiny, data, run, attention=False)
    # "the" and "a" are no words for SQuAD: city of paris, and w5 w6 are what is asked for.
    assert recall.items == {"a": 2 / 3, "b": 1.0, "c": 1.0}
    contained = measured(tiny, data, run, attention=False, match="contains")
    assert contained.items == {"a": 0.0, "b": 0.0, "c": 0.0}
    kept = [json.loads(line) for line in (run.folder / "generations.jsonl").open()]
    assert [one["output"] for one in kept] == ["Paris is a city, Paris!", "w6 w9 w5", "c b"]


def test_attention_is_read_on_the_answer_and_falls_outside_the_prompt(tiny, rows, run):
    measured(tiny, rows(*ROWS), run, layer=1)
    found = read(run)
    model, tokenizer = tiny.model, tiny.tokenizer
    model.set_attn_implementation("eager")
    prompts = {"a": "what is the capital of France ?", "b": "w1 w2 w3 ?"}
    answers = {"a": "the city of Paris", "b": "w4"}
    for key, prompt in prompts.items():
        before, after = tokenizer(prompt)["input_ids"], tokenizer(answers[key])["input_ids"][1:]
        with torch.no_grad():
            made = model(input_ids=torch.tensor([before + after]), output_attentions=True)
        user = slice(1, len(before))  # without BOS
        own = torch.stack([w[0, :, len(before) :, user].sum(-1) for w in made.attentions])
        share = Estimate.from_json(found["share"]).items[key]
        assert share == pytest.approx(float(own.mean()), abs=1e-6)
        score = Estimate.from_json(found["dependency"]).items[key]
        assert score == pytest.approx(float(own[1].max(0).values.mean()), abs=1e-6)
    assert np.array(found["heads"]).shape == (2, 4)
    assert run.record["notes"]["one_token_answers"] == 1


def test_steering_to_the_user_raises_its_share_and_no_steering_changes_nothing(tiny, rows, run):
    data = rows(*ROWS)
    plain = measured(tiny, data, run)
    shares = [read(run)["share"]["value"]]
    outputs = (run.folder / "generations.jsonl").read_bytes()
    for alpha in (0.999999, 0.5, 0.05):
        steered = measured(tiny, data, run, alpha=alpha)
        shares.append(read(run)["share"]["value"])
        if alpha > 0.99:
            assert steered.items == plain.items
            assert (run.folder / "generations.jsonl").read_bytes() == outputs
    assert shares[0] == pytest.approx(shares[1], abs=1e-5)
    assert shares[1] < shares[2] < shares[3]


def test_the_indicator_and_the_template_reach_the_prompt(tiny, rows, run):
    method = Context(indicator=" w9", chat=True)
    asked = [method._asked(one) for one in rows(*ROWS)]
    said = [one.messages[-1] for one in asked]
    assert [turn["content"] for turn in said] == [
        "what is the capital of France ? w9", "w1 w2 w3 ? w9", "w7 city w9",
    ]  # fmt: skip
    assert {turn["role"] for turn in said} == {"user"}


FILLER = [{"text": "a b. c\nd a b. c d a b c. d"}, {"prompt": "w1 w2", "answer": "w3."}]


@pytest.mark.parametrize("length", [1, 5, 12, 40])
def test_haystacks_hold_the_needle_at_the_end_of_a_sentence(rows, length):
    (needle, *_) = found = hidden(
        "the needle is here", "w9 ?", rows(*FILLER), [length], 5, lambda text: len(text.split())
    )
    assert needle.cluster == str(length)
    places = []
    for one in found:
        text, question = one.prompt.split("\n\n")
        assert question == "w9 ?"
        before, after = text.split("the needle is here")
        assert len((before + after).split()) == length
        assert not before or before.strip().endswith(".") or not after
        places.append(len(before.split()))
    assert places == sorted(places)
    assert places[0] == 0
    assert places[-1] == length
    assert len({one.id for one in found}) == 5


def test_needles_are_asked_and_graded_by_their_keywords(tiny, rows, run):
    settings = {"needle": "capital of France", "keywords": ["capital", "France"], "lengths": 2}
    data = rows({"text": "a b c d"})
    found = measured(tiny, data, run, **settings, depths=3, shortest=10, longest=20)
    assert len(found.items) == 6
    assert found.clusters
    assert set(found.items.values()) <= {0.0, 0.5, 1.0}
    with pytest.raises(InputError, match="room for"):
        measured(tiny, data, run, **settings, shortest=60)
    with pytest.raises(InputError, match="blocks 0 to 1"):
        measured(tiny, rows(*ROWS), run, layer=2)
