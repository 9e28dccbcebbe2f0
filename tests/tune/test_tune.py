"""The tuners' products against the libraries that people load them with."""

import json

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import deltaloom
from deltaloom.core.base import Base
from deltaloom.core.errors import InputError
from deltaloom.tune.lora import Lora


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("tune")
    tiny.base_in(home / "base")
    tiny.rows_in(home / "rows.jsonl")
    return home


IDS = torch.tensor([[1, 5, 6, 8, 17, 14, 2]])


def tuned(home, method, out, base="base", **settings):
    values = {"lr": 1e-2, "epochs": 1, "batch_size": 8, **settings}
    return deltaloom.tune(method, base=home / base, data=home / "rows.jsonl", out=out, **values)


def test_a_base_that_does_not_load_is_not_said_to_lack_modules(tmp_path):
    folder = tiny.base_in(tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "fancylm"}))
    with pytest.raises(InputError, match=r"base: the model does not load \(.*fancylm") as caught:
        Lora().attach(Base(model=str(folder)), 0)
    assert "modules" not in str(caught.value)


@pytest.mark.parametrize("settings", [{}, {"rslora": True, "r": 3}, {"modules": ["q_proj"]}])
def test_an_adapter_and_its_delta_are_the_same_model(home, tmp_path, settings):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    delta = tuned(home, "lora", tmp_path / "out", **settings)
    base = Base(model=str(home / "base"))
    peft = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(home / "base"), tmp_path / "out"
    ).eval()
    plain = base.load()
    state = plain.state_dict()
    assert delta.names()
    with torch.no_grad():
        wanted, before = peft(IDS).logits, plain(IDS).logits
        for name in delta.names():
            state[name] += delta.to_dense(name)
        got = plain(IDS).logits
    assert torch.allclose(got, wanted, atol=1e-5)
    assert not torch.allclose(before, wanted, atol=1e-3)


def test_full_tuning_keeps_the_base_type_and_trains_in_float32(home, tmp_path):
    bf16 = tmp_path / "bf16"
    tiny.base_in(bf16)
    weights = {k: v.bfloat16() for k, v in load_file(bf16 / "model.safetensors").items()}
    save_file(weights, bf16 / "model.safetensors", metadata={"format": "pt"})
    config = (bf16 / "config.json").read_text().replace('"float32"', '"bfloat16"')
    (bf16 / "config.json").write_text(config)
    delta = deltaloom.tune(
        "full", base=bf16, data=home / "rows.jsonl", lr=1e-2, epochs=1, out=tmp_path / "out"
    )
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {one.dtype for one in stored.values()} == {torch.bfloat16}
    assert delta.norm() > 0


def test_full_tuning_of_a_base_that_stores_its_tied_head(home, tmp_path):
    base = tmp_path / "base"
    tiny.base_in(base)
    weights = load_file(base / "model.safetensors")
    weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    delta = deltaloom.tune(
        "full", base=base, data=home / "rows.jsonl", lr=1e-2, epochs=1, out=tmp_path / "out"
    )
    assert "lm_head.weight" in delta.names()
    merged = deltaloom.merge("average", base=base, deltas=[tmp_path / "out"], out=tmp_path / "m")
    loaded = [d.apply(Base(model=str(base)))(IDS).logits for d in (delta, merged)]
    assert torch.equal(*loaded)


def test_gradient_checkpointing_changes_nothing(home, tmp_path):
    plain = tuned(home, "lora", tmp_path / "plain")
    saved = tuned(home, "lora", tmp_path / "saved", gradient_checkpointing=True)
    assert (plain - saved).norm() < 1e-4 * plain.norm()


def test_bfloat16_follows_float32(home, tmp_path):
    exact = tuned(home, "lora", tmp_path / "exact")
    fast = tuned(home, "lora", tmp_path / "fast", precision="bfloat16")
    assert exact.dot(fast) > 0.9 * exact.norm() * fast.norm()
    stored = load_file(tmp_path / "fast" / "adapter_model.safetensors")
    assert {one.dtype for one in stored.values()} == {torch.float32}


def test_adapters_differ_by_seed_and_not_by_time(home):
    base = Base(model=str(home / "base"))
    first, again, other = (Lora(r=2).attach(base, seed).state_dict() for seed in (0, 0, 1))
    name = next(key for key in first if "lora_A" in key)
    assert torch.equal(first[name], again[name])
    assert not torch.equal(first[name], other[name])


def test_modules_that_are_not_there_are_named(home, tmp_path):
    with pytest.raises(InputError, match=r"modules = \['query'\]"):
        tuned(home, "lora", tmp_path / "out", modules=["query"])
    assert not (tmp_path / "out").exists()


def test_rows_over_the_limit_are_counted(home, tmp_path):
    tuned(home, "lora", tmp_path / "out", max_length=6)
    from deltaloom.core.run import Run

    notes = Run.read(tmp_path / "out")["notes"]
    assert notes["truncated_rows"] > 0
    assert notes["max_length"] == 6
