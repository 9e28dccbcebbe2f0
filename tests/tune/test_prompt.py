"""`tune prompt` against the base on real tokens, PEFT, and similarities by brute force."""

import json
import math
import shutil

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import deltaloom
from deltaloom.core.base import Base
from deltaloom.core.delta import load
from deltaloom.core.deltas.prompt import Prompt
from deltaloom.core.errors import InputError
from deltaloom.core.run import Run
from deltaloom.engine.generate import generate_greedily
from deltaloom.testing import product
from deltaloom.tune import _spot
from deltaloom.tune import prompt as module
from deltaloom.tune.prompt import PromptTuning, prompt_of

FORMS = ("prompt", "prefix")
K = 4
IDS = torch.tensor([[1, 5, 6, 8, 17, 14, 2], [1, 7, 6, 9, 17, 15, 2]])


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("prompt")
    tiny.base_in(home / "base")
    tiny.rows_in(home / "rows.jsonl")
    for form in FORMS:
        tuned(home, home / form, form=form)
    for seed in (1, 2, 3):
        tuned(home, home / "library" / f"s{seed}", seed=seed, lr=0.3)
    return home


def tuned(home, out, base="base", **settings):
    values = {"epochs": 1, "batch_size": 8, "virtual_tokens": K, **settings}
    return deltaloom.tune("prompt", base=home / base, data=home / "rows.jsonl", out=out, **values)


def stored(folder):
    return load_file(folder / "adapter_model.safetensors")["prompt_embeddings"]


def logged(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("form", FORMS)
def test_the_product_loads_by_peft_and_as_a_prompt(home, form):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = Base(model=str(home / "base"))
    plain = AutoModelForCausalLM.from_pretrained(home / "base")
    before = plain(IDS).logits
    peft = PeftModel.from_pretrained(plain, home / form).eval()
    delta = load(home / form, base)
    assert isinstance(delta, Prompt)
    applied = delta.apply(base)
    with torch.no_grad():
        wanted, got = peft(input_ids=IDS).logits, applied(input_ids=IDS).logits
    assert torch.equal(got, wanted)
    assert not torch.allclose(got[:, -IDS.shape[1] :], before, atol=1e-3)
    tokenizer = base.tokenizer()
    both = generate_greedily(applied, tokenizer, [[1, 5], [1, 5, 6, 8, 17]], 5)
    alone = [
        generate_greedily(applied, tokenizer, [ids], 5)[0] for ids in ([1, 5], [1, 5, 6, 8, 17])
    ]
    assert both == alone


@pytest.mark.parametrize("form", FORMS)
def test_a_text_begins_as_its_own_tokens_before_the_input(home, form):
    base = Base(model=str(home / "base"))
    method = PromptTuning(form=form, virtual_tokens=K, text="who lives in oslo ?")
    model = method.attach(base, 0).eval()
    ids = torch.tensor([base.tokenizer()("who lives in oslo").input_ids])
    with torch.no_grad():
        got = model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
        wanted = base.load()(torch.cat([ids.repeat(2, 1), IDS], 1)).logits
    assert torch.allclose(got[:, -IDS.shape[1] :], wanted[:, K:], atol=1e-5)


def test_beginnings_are_rows_of_the_vocabulary_to_the_bit(home):
    base = Base(model=str(home / "base"))
    table = base.load().get_input_embeddings().weight
    special = set(base.tokenizer().all_special_ids)

    def begun(seed=0, **settings):
        return prompt_of(PromptTuning(virtual_tokens=K, **settings).attach(base, seed))

    def rows(prompt):
        return [int((table == row).all(1).nonzero()[0, 0]) for row in prompt]

    drawn = rows(begun())
    assert not special & set(drawn)
    assert rows(begun()) == drawn != rows(begun(seed=1))
    few = sorted(set(range(len(table))) - special)[:2]
    assert set(rows(begun(common=2))) <= set(few)
    ids = base.tokenizer()("yes no").input_ids
    assert rows(begun(text="yes no")) == ids * 2
    labels = begun(labels=["yes", "tom lives"])
    pair = base.tokenizer()("tom lives").input_ids
    assert torch.equal(labels[0], table[ids[0]])
    assert torch.equal(labels[1], table[pair].mean(0))
    assert rows(labels[2:]) == drawn[2:]


@pytest.mark.parametrize("form", FORMS)
def test_a_start_is_where_training_begins(home, tmp_path, form):
    tuned(home, tmp_path / "out", form=form, start=str(home / form), lr=1e-30, batch_size=24)
    assert torch.equal(stored(tmp_path / "out"), stored(home / form))
    deltaloom.measure(
        "loss", base=home / "base", deltas=[home / form], tasks=home / "rows.jsonl",
        out=tmp_path / "loss",
    )  # fmt: skip
    estimate = next((tmp_path / "loss").rglob("estimate.json"))
    record = json.loads(estimate.read_text())
    assert logged(tmp_path / "out")[0]["loss"] == pytest.approx(record["value"], rel=1e-4)


def brute(one, other, by):
    def cosine(a, b):
        length = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b))
        return sum(x * y for x, y in zip(a, b, strict=True)) / length

    one, other = one.tolist(), other.tolist()
    if by == "token":
        return sum(cosine(a, b) for a in one for b in other) / (len(one) * len(other))
    return cosine(*([sum(column) for column in zip(*rows, strict=True)] for rows in (one, other)))


@pytest.mark.parametrize("by", ["average", "token"])
def test_similarity_is_that_of_brute_force(by):
    draw = torch.Generator().manual_seed(0)
    one, other = (torch.randn(k, 6, generator=draw) for k in (3, 5))
    assert _spot.similarity(one, other, by) == pytest.approx(brute(one, other, by), abs=1e-12)
    scaled = _spot.similarity(one, 7 * one, "average")
    assert scaled == pytest.approx(1.0)


def test_retrieval_by_hand():
    task = torch.tensor([[1.0, 0.0]])
    sources = {
        "near": torch.tensor([[2.0, 0.0]]),
        "next": torch.tensor([[3.0, 4.0]]),
        "away": torch.tensor([[-1.0, 0.0]]),
    }

    def retrieve(how, top, loss=None):
        return _spot.retrieve(task, sources, by="average", how=how, top=top, loss=loss)

    prompt, record = retrieve("best", 1)
    assert record["similarities"] == pytest.approx({"near": 1.0, "next": 0.6, "away": -1.0})
    assert torch.equal(prompt, sources["near"])
    prompt, record = retrieve("best", 2, lambda prompt: -float(prompt.sum()))
    assert record["losses"] == {"near": -2.0, "next": -7.0}
    assert torch.equal(prompt, sources["next"])
    prompt, record = retrieve("mean", 3)
    assert record["weights"] == pytest.approx({"near": 1 / 1.6, "next": 0.6 / 1.6})
    assert torch.allclose(prompt, torch.tensor([[(2 + 0.6 * 3) / 1.6, 0.6 * 4 / 1.6]]))
    del sources["near"], sources["next"]
    with pytest.raises(InputError, match="no prompt in it is similar"):
        retrieve("mean", 3)


def test_a_library_begins_with_what_is_like_the_task(home, tmp_path, monkeypatch):
    seen = {}
    plain = _spot.retrieve

    def spy(task, sources, **named):
        seen["task"], seen["found"] = task, plain(task, sources, **named)
        return seen["found"]

    monkeypatch.setattr(_spot, "retrieve", spy)
    settings = {"library": str(home / "library"), "embedding_steps": 5, "top": 2}
    tuned(home, tmp_path / "out", lr=1e-30, **settings)
    notes = Run.read(tmp_path / "out")["notes"]["retrieved"]
    for seed in (1, 2, 3):
        folder = home / "library" / f"s{seed}"
        wanted = brute(seen["task"], stored(folder), "average")
        assert notes["similarities"][str(folder)] == pytest.approx(wanted, abs=1e-6)
    ((taken, weight),) = notes["weights"].items()
    assert weight == 1.0
    nearest = sorted(notes["similarities"], key=notes["similarities"].get)[-2:]
    assert set(notes["losses"]) == set(nearest)
    assert taken == min(nearest, key=notes["losses"].get)
    assert torch.equal(stored(tmp_path / "out"), stored(home / "library" / taken))
    # The embedding is the prompt after so many steps at a constant rate.
    tuned(home, tmp_path / "five", epochs=5 / 3, schedule="constant_with_warmup", lr=1e-30)
    assert torch.equal(stored(tmp_path / "five"), seen["task"])


def test_a_library_interrupted_after_retrieval_ends_in_the_same_bytes(home, tmp_path, monkeypatch):
    settings = {"library": [str(home / "library" / "s1"), str(home / "library" / "s2")]}
    settings |= {"embedding_steps": 4, "retrieve": "mean", "top": 2}
    tuned(home, tmp_path / "whole", **settings)
    calls = []
    plain = module.train

    def stopped(*arguments):
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return plain(*arguments)

    monkeypatch.setattr(module, "train", stopped)
    with pytest.raises(KeyboardInterrupt):
        tuned(home, tmp_path / "out", **settings)
    monkeypatch.setattr(_spot, "retrieve", None)
    tuned(home, tmp_path / "out", **settings)
    assert product(tmp_path / "whole") == product(tmp_path / "out")
    whole, again = (Run.read(tmp_path / name)["notes"]["retrieved"] for name in ("whole", "out"))
    assert whole == again


def test_starts_that_do_not_fit_are_refused(home, tmp_path):
    tiny.base_in(tmp_path / "other", seed=1)
    tiny.base_in(tmp_path / "wide", hidden_size=32)
    bare = tmp_path / "bare"
    shutil.copytree(home / "prompt", bare)
    (bare / "delta.json").unlink()
    (tmp_path / "empty").mkdir()
    deltaloom.tune("lora", base=home / "base", data=home / "rows.jsonl", epochs=0.3,
                   out=tmp_path / "lora")  # fmt: skip
    prompt = str(home / "prompt")
    for message, settings in {
        "holds a lowrank delta": {"start": str(tmp_path / "lora")},
        "is a delta over": {"start": prompt, "base": tmp_path / "other"},
        "16 wide, one for .* is 32": {"start": str(bare), "base": tmp_path / "wide"},
        "is of another base": {"library": str(bare), "base": tmp_path / "wide"},
        "is a soft prompt, not a prefix; change form": {"start": prompt, "form": "prefix"},
        "has 4 virtual tokens, not 5; set virtual_tokens=4": {"start": prompt, "virtual_tokens": 5},
        "library: .* holds no folder of a soft prompt": {"library": str(tmp_path / "empty")},
        "no such folder": {"start": str(tmp_path / "nowhere")},
        "start and library are two beginnings": {"start": prompt, "library": prompt},
        "too short for 5 labels": {"labels": list("abcde")},
        "text: ' ' has no tokens": {"text": " "},
        "leave no room": {"virtual_tokens": 63},
        "gradient_checkpointing would lose a prefix": {
            "form": "prefix",
            "gradient_checkpointing": True,
        },
    }.items():
        with pytest.raises(InputError, match=message):
            tuned(home, tmp_path / "out", **settings)
        assert not (tmp_path / "out").exists(), message


@pytest.mark.parametrize("form", FORMS)
def test_a_bfloat16_base_is_tuned_in_float32(home, tmp_path, form):
    shutil.copytree(home / "base", tmp_path / "half")
    weights = load_file(tmp_path / "half" / "model.safetensors")
    save_file(
        {name: value.bfloat16() for name, value in weights.items()},
        tmp_path / "half" / "model.safetensors",
        metadata={"format": "pt"},
    )
    config = (tmp_path / "half" / "config.json").read_text().replace('"float32"', '"bfloat16"')
    (tmp_path / "half" / "config.json").write_text(config)
    tuned(home, tmp_path / "out", base=tmp_path / "half", form=form, lr=1e-5)
    found = stored(tmp_path / "out")
    assert found.dtype == torch.float32
    # Steps of 1e-5 are far below what bfloat16 can tell apart.
    begun = prompt_of(
        PromptTuning(form=form, virtual_tokens=K).attach(Base(model=str(tmp_path / "half")), 0)
    )
    assert 0 < (found - begun).abs().max() < 1e-4


@pytest.mark.parametrize("form", FORMS)
def test_rows_leave_room_for_virtual_tokens(home, tmp_path, form):
    tiny.base_in(tmp_path / "short", max_position_embeddings=12)
    tuned(home, tmp_path / "out", base=tmp_path / "short", form=form)
    notes = Run.read(tmp_path / "out")["notes"]
    assert notes["max_length"] == 12 - K
    assert notes["truncated_rows"] > 0


def test_gradient_checkpointing_and_micro_batches_change_nothing(home, tmp_path):
    plain = load(home / "prompt", Base(model=str(home / "base")))
    saved = tuned(home, tmp_path / "saved", gradient_checkpointing=True, micro_batch=4)
    assert (plain - saved).norm() < 1e-3 * plain.norm()


def test_early_stopping_keeps_the_best_prompt(home, tmp_path):
    tuned(
        home,
        tmp_path / "out",
        epochs=8,
        lr=1.0,
        evaluate={"data": [str(home / "rows.jsonl")], "every": 3},
    )
    notes = Run.read(tmp_path / "out")["notes"]
    lines = logged(tmp_path / "out")
    found = [one[key] for one in lines for key in one if key.startswith("evaluation_")]
    assert len(found) > 1
    assert notes["best_evaluation"]["value"] == min(found)
