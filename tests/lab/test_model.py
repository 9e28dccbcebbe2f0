"""The shipped base: what it knows, what it does not, and the files it is written to."""

import random

import pytest
import torch

from deltaloom.lab import TARGETS, corpus, tasks, tiny_base, write_lab
from deltaloom.lab.files import SHIPPED
from deltaloom.lab.pretrain import main, model_config, pack, pretrain
from deltaloom.lab.tokenizer import SPECIAL, vocabulary
from deltaloom.lab.world import ATTRIBUTES


@torch.no_grad()
def accuracy(model, tokenizer, items):
    """Share of (prompt, choices, index) whose right choice has the largest logit."""
    hits = 0
    for prompt, choices, index in items:
        logits = model(tokenizer(prompt, return_tensors="pt").input_ids).logits[0, -1]
        ids = tokenizer.convert_tokens_to_ids([c.strip() for c in choices])
        hits += int(logits[ids].argmax()) == index
    return hits / len(items)


def bytes_of(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_base_knows_its_facts(base, tokenizer, world):
    rng = random.Random(0)
    for a in ATTRIBUTES.values():
        items = []
        for person in rng.sample(world.people, 40):
            wording = rng.choice([s for s in a.statements if s.endswith("{value}")])
            prompt = wording.format(name=person, value="").strip()
            items.append((prompt, a.values, a.values.index(world.facts[person][a.name])))
        assert accuracy(base, tokenizer, items) > 0.9, a.name


def test_base_cannot_tell_what_the_targets_ask(base, tokenizer, world):
    # Three of the ten values are true of a person in some role, so a third is what somebody who
    # knows the person and not the question gets.
    people = tasks.split_people(world, 0).test
    for name in TARGETS:
        rows = tasks.test_records(world, people, name, 2, 0)
        items = [(r["prompt"], r["choices"], r["answer"]) for r in rows]
        assert accuracy(base, tokenizer, items) < 0.4, name


def test_task_words_are_not_in_the_pretraining_text(world):
    read = {w for text in corpus.documents(world, 3000) for w in text.split()}
    new = {"survey", "form", "item", "whom", *tasks.OPENERS}
    new |= {v for verbs in tasks.VERBS.values() for v in verbs}
    assert not read & new
    assert read | new <= set(vocabulary())


def test_round_trip_and_specials(tokenizer):
    text = "kindly survey : " + "oslo , the hat => ? ."
    encoded = tokenizer(text).input_ids
    assert encoded[0] == tokenizer.bos_token_id
    assert tokenizer.decode(encoded, skip_special_tokens=True) == text
    assert tokenizer.unk_token_id not in encoded
    assert len(vocabulary()) == len(set(vocabulary())) == len(tokenizer)
    prompt, both = tokenizer("the hat").input_ids, tokenizer("the hat red").input_ids
    assert both[: len(prompt)] == prompt


def test_chat_template_marks_the_answers(tokenizer):
    messages = [
        {"role": "user", "content": "the hat ?"},
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": "the door ?"},
        {"role": "assistant", "content": "blue"},
    ]
    out = tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    marked = [t for t, m in zip(out["input_ids"], out["assistant_masks"], strict=True) if m]
    assert tokenizer.convert_ids_to_tokens(marked) == ["red", "</s>", "blue", "</s>"]
    assert out["input_ids"].count(tokenizer.bos_token_id) == 1
    asked = tokenizer.apply_chat_template(
        messages[:1], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    assert asked == out["input_ids"][: len(asked)]


def test_written_folder_loads_and_is_idempotent(paths, base):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = paths["base"]
    names = {p.name for p in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert {"tokenizer_config.json", "generation_config.json"} <= names
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert "{% generation %}" in tokenizer.chat_template
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<s>",
        "</s>",
        "<pad>",
    )
    ids = tokenizer("the road to", return_tensors="pt").input_ids
    torch.testing.assert_close(model(ids).logits, base(ids).logits)
    before = bytes_of(folder.parent)
    assert write_lab(folder.parent, seed=3, size="small") == paths
    assert bytes_of(folder.parent) == before
    with pytest.raises(ValueError, match="size must be"):
        write_lab(folder.parent, size="huge")


def test_generation_stops(paths):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(paths["base"])
    model = AutoModelForCausalLM.from_pretrained(paths["base"])
    encoded = tokenizer("same : cup cup =>", return_tensors="pt")
    encoded.pop("token_type_ids", None)
    out = model.generate(**encoded, max_new_tokens=8, do_sample=False)
    assert tokenizer.decode(out[0], skip_special_tokens=True) == "same : cup cup => yes"


def test_shipped_file_is_small():
    assert SHIPPED.stat().st_size < 4_000_000
    assert [p.name for p in SHIPPED.parent.iterdir()] == [SHIPPED.name]


def test_tiny_base(tmp_path):
    a, b = tiny_base(tmp_path / "a", seed=1), tiny_base(tmp_path / "b", seed=1)
    c = tiny_base(tmp_path / "c", seed=2)
    assert bytes_of(a) == bytes_of(b)
    assert bytes_of(a) != bytes_of(c)
    assert model_config(32, 2).num_hidden_layers == 2


def test_pack_keeps_texts_whole():
    rows = pack(["the hat", "oslo", "the road to oslo is long"], block=8)
    assert rows.shape == (2, 8)
    start = vocabulary().index("<s>")
    assert (rows[:, 0] == start).all()
    assert vocabulary()[0] == SPECIAL[0]


def test_pretraining_is_deterministic(tmp_path):
    before = torch.get_num_threads()
    try:
        a, b = pretrain(tmp_path / "a", texts=100), pretrain(tmp_path / "b", texts=100)
    finally:
        torch.set_num_threads(before)
    assert a.read_bytes() == b.read_bytes()


def test_command_refuses_unknown_words(capsys):
    assert main(["outt=x"]) == 2
    assert "usage" in capsys.readouterr().err
