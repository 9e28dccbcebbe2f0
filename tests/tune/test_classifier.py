"""Sequence classifiers: tuned, loaded and measured as causal models are."""

import json

import pytest
import tiny
import torch

import deltaloom
from deltaloom.core.base import Base
from deltaloom.core.encoding import encode_labelled
from deltaloom.core.errors import InputError
from deltaloom.core.estimate import Estimate
from deltaloom.core.examples import Examples
from deltaloom.core.features import Features

LABELS = ("oslo", "rome", "lima")
IDS = torch.tensor([[1, 5, 6, 8, 17], [1, 9, 6, 0, 0]])
REAL = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
SETTINGS = {"lr": 1e-2, "epochs": 2, "batch_size": 8}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("classifier")
    tiny.base_in(home / "base")
    tiny.rows_in(home / "rows.jsonl")
    rows = [json.loads(line) for line in (home / "rows.jsonl").read_text().splitlines()]
    asked = [
        {"id": r["id"], "prompt": r["prompt"], "choices": LABELS, "answer": r["completion"]}
        for r in rows
    ]
    (home / "asked.jsonl").write_text("".join(json.dumps(one) + "\n" for one in asked))
    return home


def base_of(home):
    return Base(model=str(home / "base"), labels=LABELS)


def tuned(home, method, out, **settings):
    return deltaloom.tune(
        method, base=base_of(home), data=home / "rows.jsonl", out=out, **SETTINGS | settings
    )


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS, attention_mask=REAL).logits


def test_an_adapter_brings_its_head(home, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    delta = tuned(home, "lora", tmp_path / "out")
    assert "score.weight" in delta.names()
    bare = AutoModelForSequenceClassification.from_pretrained(
        home / "base", num_labels=3, pad_token_id=0
    )
    wanted = logits(PeftModel.from_pretrained(bare, tmp_path / "out"))
    assert torch.equal(logits(delta.apply(base_of(home))), wanted)


def test_a_tuned_model_is_a_classifier_of_its_labels(home, tmp_path):
    from transformers import AutoModelForSequenceClassification

    delta = tuned(home, "full", tmp_path / "out")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert model.config.id2label == dict(enumerate(LABELS))
    assert torch.equal(logits(delta.apply(base_of(home))), logits(model))
    name = "model.layers.0.mlp.up_proj.weight"
    own = base_of(home).load(new_head=True).get_parameter(name)
    assert torch.allclose(delta.to_dense(name), model.get_parameter(name) - own)


def test_accumulated_gradients_are_those_of_the_whole_batch(home, tmp_path):
    """transformers' own classifiers are not: their loss ignores the items it is told."""
    settings = {"clip": 0.0, "epochs": 1}
    whole = tuned(home, "lora", tmp_path / "whole", **settings)
    parts = tuned(home, "lora", tmp_path / "parts", micro_batch=2, **settings)
    assert (whole - parts).norm() < 1e-3 * whole.norm()


def test_choice_is_the_largest_output(home, tmp_path):
    delta = tuned(home, "lora", tmp_path / "out")
    deltaloom.measure(
        "choice",
        base=base_of(home),
        deltas=[str(tmp_path / "out")],
        tasks=home / "asked.jsonl",
        out=tmp_path / "measured",
    )
    path = tmp_path / "measured" / "out--asked" / "estimate.json"
    found = Estimate.from_json(json.loads(path.read_text()))
    model, tokenizer = delta.apply(base_of(home)), base_of(home).tokenizer()
    assert len(found.items) == 24
    for row in Examples.read(home / "asked.jsonl"):
        ids = torch.tensor([tokenizer(row.prompt)["input_ids"]])
        with torch.no_grad():
            best = LABELS[int(model(input_ids=ids).logits[0].argmax())]
        assert found.items[row.id] == float(best == row.response)


def test_clear_judges_classes(home, tmp_path):
    tuned(home, "clear", tmp_path / "out", warm_up=1, adapter="bottleneck")
    store = Features.open(tmp_path / "out" / "scores")
    assert set(store.index["predicted"]) <= set(LABELS)
    assert min(store.index["score"]) < max(store.index["score"]) <= 1


def test_rows_are_their_prompts_and_their_classes(home):
    rows, tokenizer = Examples.read(home / "rows.jsonl"), base_of(home).tokenizer()
    found = encode_labelled(rows, tokenizer, 5, LABELS)
    for row, one in zip(rows, found, strict=True):
        ids = tokenizer(row.prompt)["input_ids"]
        assert one.input_ids == ids[:5]
        assert one.truncated == (len(ids) > 5)
        assert LABELS[one.label] == row.completion


@pytest.mark.parametrize(
    ("method", "settings", "said"),
    [
        ("lora", {"base": {"labels": ["oslo", "rome"]}}, "'lima' is none of the base's labels"),
        ("clear", {"adapter": "prefix", "warm_up": 1}, "prefix on a sequence classifier"),
    ],
)
def test_what_does_not_fit_is_said(home, tmp_path, method, settings, said):
    base = {"model": str(home / "base"), "labels": list(LABELS), **settings.pop("base", {})}
    with pytest.raises(InputError, match=said):
        deltaloom.tune(
            method, base=base, data=home / "rows.jsonl", out=tmp_path / "o", **SETTINGS | settings
        )


def test_a_base_without_a_head_is_not_measured(home, tmp_path):
    with pytest.raises(InputError, match=r"lack score.weight .* tune it first"):
        deltaloom.measure(
            "choice", base=base_of(home), tasks=home / "asked.jsonl", out=tmp_path / "measured"
        )


@pytest.mark.parametrize(
    ("verb", "method", "inputs"),
    [("measure", "loss", {"tasks": "asked.jsonl"}), ("select", "less", {"pool": "rows.jsonl"})],
)
def test_methods_of_causal_models_refuse_a_classifier(home, tmp_path, verb, method, inputs):
    if verb == "select":
        inputs = {**inputs, "target": "asked.jsonl"}
    named = {key: home / name for key, name in inputs.items()}
    with pytest.raises(InputError, match=f"{verb} {method} does not work on sequence classifiers"):
        getattr(deltaloom, verb)(method, base=base_of(home), out=tmp_path / "out", **named)
