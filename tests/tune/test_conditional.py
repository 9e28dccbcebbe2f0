"""The indicator goes to turns above the threshold and nowhere else; tuning is LoRA's or full."""

import json
from collections import Counter

import numpy as np
import pytest
import tiny
import torch

import deltaloom
from deltaloom.core.base import Base
from deltaloom.core.errors import InputError
from deltaloom.core.examples import Examples
from deltaloom.core.features import Features
from deltaloom.core.registry import get
from deltaloom.tune.lora import Lora


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("conditional")
    tiny.base_in(home / "base", initializer_range=0.6)
    tiny.rows_in(home / "rows.jsonl", 12)
    turns = [
        {"role": "user", "content": "where lives tom ?"},
        {"role": "assistant", "content": "in oslo"},
        {"role": "user", "content": "who likes rome ?"},
        {"role": "assistant", "content": "anna ."},
    ]
    with open(home / "rows.jsonl", "a") as file:
        file.write(json.dumps({"id": "talk", "messages": turns}) + "\n")
        file.write(json.dumps({"id": "plain", "text": "tom lives in rome ."}) + "\n")
    return home


@pytest.fixture
def seen(monkeypatch):
    """The rows that the inner tuning was given."""
    given = []
    inner = Lora.tune

    def tune(self, base, data, run, **options):
        given.append(list(data))
        return inner(self, base, data, run, **options)

    monkeypatch.setattr(Lora, "tune", tune)
    return given


def tuned(home, out, **settings):
    values = {"epochs": 1, "batch_size": 8, "indicator": " max", **settings}
    deltaloom.tune("conditional", base=home / "base", data=home / "rows.jsonl", out=out, **values)
    return Features.open(out / "scores")


def marked(rows):
    """Row and message of every indicator."""
    found = set()
    for row in rows:
        contents = [m["content"] for m in row.messages or ()] or [row.prompt or ""]
        found |= {(row.id, k) for k, text in enumerate(contents) if text.endswith(" max")}
        assert " max" not in (row.completion or "") + (row.text or "")
    return found


def test_scores_are_by_hand_and_the_indicator_follows_them(home, tmp_path, seen):
    scores = tuned(home, tmp_path / "first", threshold=0.0, layer=1)
    values = scores.matrix()[:, 0]
    assert [*Counter(scores.index["example"]).values()] == [1] * 12 + [2]
    assert scores.ids[-2:] == ["talk:0", "talk:1"]
    assert scores.index["asked"][-2:] == [0, 2]

    model, tokenizer = (
        Base(model=str(home / "base")).load(),
        Base(model=str(home / "base")).tokenizer(),
    )
    model.set_attn_implementation("eager")
    for k, row in enumerate(Examples.read(home / "rows.jsonl")[:12]):
        before, after = (tokenizer(text)["input_ids"] for text in (row.prompt, row.completion))
        ids = torch.tensor([before + after])
        with torch.no_grad():
            weights = model(input_ids=ids, output_attentions=True).attentions[1][0]
        share = weights[:, len(before) :, : len(before)].sum(-1).max(0).values.mean()
        assert values[k] == pytest.approx(float(share), abs=1e-6)

    middle = float(np.sort(values)[6:8].mean())
    tuned(home, tmp_path / "second", threshold=middle, layer=1)
    index = zip(values, scores.index["example"], scores.index["asked"], strict=True)
    assert marked(seen[1]) == {(row, asked) for value, row, asked in index if value > middle}
    assert len(marked(seen[1])) == 7

    tuned(home, tmp_path / "third", threshold=middle, layer=1, assign="random")
    assert len(marked(seen[2])) == 7
    assert marked(seen[2]) != marked(seen[1])
    notes = json.loads((tmp_path / "third" / "run.json").read_text())["notes"]
    assert (notes["turns"], notes["indicated_turns"]) == (14, 7)
    assert notes["indicator_tokens"] == tokenizer("max")["input_ids"]


def test_without_indicated_turns_it_is_lora_to_the_byte(home, tmp_path):
    tuned(home, tmp_path / "none", threshold=1.0, dropout=0.0)
    settings = {"epochs": 1, "batch_size": 8, "lr": 2e-4, "r": 16, "alpha": 16.0}
    deltaloom.tune(
        "lora", base=home / "base", data=home / "rows.jsonl", out=tmp_path / "lora", **settings
    )
    name = "adapter_model.safetensors"
    assert (tmp_path / "none" / name).read_bytes() == (tmp_path / "lora" / name).read_bytes()


def test_full_tuning_and_another_scorer(home, tmp_path):
    first = tuned(home, tmp_path / "full", tuned="full", lr=1e-2, threshold=0.5)
    assert (tmp_path / "full" / "model.safetensors").exists()
    again = tuned(home, tmp_path / "again", scorer=str(tmp_path / "full"))
    assert not np.allclose(first.matrix(), again.matrix(), atol=1e-3)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"indicator": "  "}, "blank"),
        ({"tuned": "full", "modules": ["q_proj"]}, "leave it out"),
        ({"layer": 2}, "blocks 0 to 1"),
    ],
)
def test_what_cannot_be_is_refused(home, tmp_path, settings, said):
    with pytest.raises(InputError, match=said):
        tuned(home, tmp_path / "out", **settings)


def test_rows_without_a_user_are_refused(home, tmp_path):
    (tmp_path / "texts.jsonl").write_text('{"text": "tom lives in rome ."}\n')
    with pytest.raises(InputError, match="no row has a user's turn"):
        deltaloom.tune(
            "conditional", base=home / "base", data=tmp_path / "texts.jsonl", out=tmp_path / "out"
        )
    assert get("tune", "conditional").make().model_dump()["threshold"] == 0.6
