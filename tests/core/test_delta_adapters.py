"""PEFT's adapter folders: layouts, DoRA, biases, modules held whole, truncation, refusals."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from changes import CONFIG, WEIGHTS, agree, combined, dense, merged, trained_in, with_tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from small import adapter_in, logits

from deltaloom.core.base import Base
from deltaloom.core.delta import load
from deltaloom.core.deltas._reading import read_adapter
from deltaloom.core.deltas.dense import Dense, HeldChange
from deltaloom.core.deltas.lowrank import Factors, LowRank, read_factors
from deltaloom.core.errors import InputError

# PEFT's advice on tied weights and flags, and a deprecation inside transformers.
pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning:peft", "ignore::FutureWarning:transformers"
)


def oracle(folder, base):
    """What PEFT says a LoRA adapter changes, by tensor of the base, float64."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(base.load(), folder)
    return {
        f"{name.removeprefix('base_model.model.')}.weight": module.get_delta_weight(
            "default"
        ).double()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


@pytest.fixture(scope="module")
def biased(tmp_path_factory):
    """A tiny Llama with biases and an output layer of its own."""
    import tiny

    folder = tmp_path_factory.mktemp("base") / "biased"
    return Base(model=str(tiny.base_in(folder, attention_bias=True, tie_word_embeddings=False)))


# GPT-2's Conv1D modules, embeddings and tied weights.

CONV = ["c_attn", "c_proj", "c_fc"]


@pytest.mark.parametrize("targets", [CONV, ["attn.c_proj"], [*CONV, "wte"], [*CONV, "lm_head"]])
@pytest.mark.parametrize("flag", ["as saved", True, False])
def test_conv1d_adapters_are_read_whatever_the_flag_says(gpt2, tmp_path, targets, flag):
    folder = adapter_in(tmp_path / "a", gpt2, target_modules=targets)
    wanted = oracle(folder, gpt2)
    if flag != "as saved":
        if targets == ["attn.c_proj"]:
            pytest.skip("square modules alone cannot be told apart without the flag")
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**config, "fan_in_fan_out": flag}))
    delta = load(folder, gpt2)
    agree(dense(delta), wanted)


@pytest.mark.parametrize("targets", [CONV, [*CONV, "wte"], [*CONV, "lm_head"], ["wpe", "wte"]])
def test_sums_of_conv1d_and_embedding_adapters_are_saved_as_peft_reads_them(
    gpt2, tmp_path, targets
):
    a = adapter_in(tmp_path / "a", gpt2, seed=1, r=2, target_modules=targets)
    b = adapter_in(tmp_path / "b", gpt2, seed=2, r=3, target_modules=CONV)
    delta = load(a, gpt2) - 0.5 * load(b, gpt2)
    wanted = combined([(1, oracle(a, gpt2)), (-0.5, oracle(b, gpt2))])
    agree(dense(delta), wanted)
    delta.save(tmp_path / "d")
    agree(oracle(tmp_path / "d", gpt2), wanted)
    agree(dense(load(tmp_path / "d", gpt2)), wanted)
    from peft import PeftModel

    theirs = PeftModel.from_pretrained(gpt2.load(), tmp_path / "d").eval()
    torch.testing.assert_close(logits(delta.apply(gpt2)), logits(theirs))


def test_embedding_adapters_beside_linear_ones(llama, tmp_path):
    settings = {"target_modules": ["embed_tokens", "q_proj", "o_proj"]}
    a = adapter_in(tmp_path / "a", llama, seed=1, **settings)
    b = adapter_in(tmp_path / "b", llama, seed=2, r=3, **settings)
    assert any(name.endswith("base_layer.weight") for name in load_file(a / WEIGHTS))
    total = load(a, llama) + load(b, llama)
    wanted = combined([(1, oracle(a, llama)), (1, oracle(b, llama))])
    agree(dense(total), wanted)
    total.save(tmp_path / "d")
    agree(dense(load(tmp_path / "d", llama)), wanted)
    agree(oracle(tmp_path / "d", llama), wanted)


def test_an_embedding_adapter_is_what_peft_merges(llama, tmp_path):
    from peft import PeftModel

    folder = adapter_in(tmp_path / "a", llama, target_modules=["embed_tokens", "q_proj"])
    merged = PeftModel.from_pretrained(llama.load(), folder).merge_and_unload().state_dict()
    base = llama.load().state_dict()
    delta = load(folder, llama)
    for name in delta.names():
        torch.testing.assert_close(base[name] + delta.to_dense(name), merged[name])


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_sums_leave_tied_weights_as_the_adapter_alone_does(llama, tmp_path, target):
    folder = adapter_in(tmp_path / "a", llama, target_modules=[target, "q_proj"])
    delta = load(folder, llama)
    alone = logits(delta.apply(llama))
    torch.testing.assert_close(logits((0.5 * delta + 0.5 * delta).apply(llama)), alone)


def test_a_head_that_the_base_ties_is_not_changed_with_its_embeddings(llama, tmp_path):
    name = "model.embed_tokens.weight"
    tuned = Dense(llama, ((1.0, HeldChange({name: torch.ones(23, 16)})),))
    folder = adapter_in(tmp_path / "a", llama, target_modules=["lm_head", "q_proj"])
    both = tuned + load(folder, llama)
    with pytest.raises(InputError, match=r"lm_head.weight, which .* ties to model.embed_tokens"):
        both.apply(llama)


# What adapters hold beside their factors.


@pytest.mark.parametrize("targets", [CONV, ["attn.c_proj"], [*CONV, "wpe"]])
def test_dora_of_conv1d_and_embeddings(gpt2, tmp_path, targets):
    folder = trained_in(tmp_path / "a", gpt2, use_dora=True, target_modules=targets)
    plain = trained_in(tmp_path / "b", gpt2, r=3, target_modules=CONV)
    wanted = combined([(0.5, merged(folder, gpt2)), (1, merged(plain, gpt2))])
    total = 0.5 * load(folder, gpt2) + load(plain, gpt2)
    agree(dense(total), wanted)
    total.save(tmp_path / "d")
    agree(merged(tmp_path / "d", gpt2), wanted)
    agree(dense(load(tmp_path / "d", gpt2)), wanted)


def test_biases_and_norms_of_a_checkpoint_without_prefix(gpt2, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(gpt2.model, bare)
    tensors = load_file(bare / "model.safetensors")
    stripped = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    save_file(stripped, bare / "model.safetensors", metadata={"format": "pt"})
    base = Base(model=str(bare))
    settings = {"bias": "all", "modules_to_save": ["ln_f"], "target_modules": ["c_attn"]}
    folder = trained_in(tmp_path / "a", base, **settings)
    wanted = merged(folder, base)
    assert {"transformer.ln_f.weight", "transformer.h.0.mlp.c_fc.bias"} <= {*wanted}
    agree(dense(load(folder, base)), wanted)
    (0.5 * load(folder, base)).save(tmp_path / "d")
    agree(merged(tmp_path / "d", base), combined([(0.5, wanted)]))


def test_a_row_that_dora_would_cancel_is_saved_all_the_same(llama, tmp_path):
    folder = trained_in(tmp_path / "a", llama, use_dora=True)
    delta = load(folder, llama)
    name = "model.layers.0.self_attn.q_proj.weight"
    rows = delta.__mul__(0.5).factors[name].rows * 2  # (16,)
    total = (-1 / float(rows[3])) * delta  # row 3 of the base is left out
    wanted = combined([(-1 / float(rows[3]), merged(folder, llama))])
    total.save(tmp_path / "d")
    agree(merged(tmp_path / "d", llama), wanted)


def test_a_head_that_the_base_ties_is_a_change_over_the_embeddings(llama, tmp_path):
    folder = trained_in(tmp_path / "a", llama, modules_to_save=["lm_head"])
    held = load_file(folder / WEIGHTS)["base_model.model.lm_head.weight"]
    table = llama.load().state_dict()["model.embed_tokens.weight"]
    half = 0.5 * load(folder, llama)
    torch.testing.assert_close(half.to_dense("lm_head.weight"), (held - table) / 2)
    half.save(tmp_path / "d")
    found = load_file(tmp_path / "d" / WEIGHTS)["base_model.model.lm_head.weight"]
    torch.testing.assert_close(found, (held + table) / 2)
    by_peft = logits(load(tmp_path / "d", llama).apply(llama))
    torch.testing.assert_close(logits(half.apply(llama)), by_peft)
    assert not torch.allclose(by_peft, logits(load(folder, llama).apply(llama)), atol=1e-2)


def test_biases_of_modules_without_one(llama, tmp_path):
    """The base has no tensor for them, PEFT adds them to what the module puts out."""
    a = trained_in(tmp_path / "a", llama, seed=1, lora_bias=True)
    b = trained_in(tmp_path / "b", llama, seed=2, target_modules=["q_proj", "o_proj"])
    total = load(a, llama) + 0.5 * load(b, llama)
    name = "model.layers.0.self_attn.q_proj.bias"
    (trained,) = (
        v
        for k, v in load_file(a / WEIGHTS).items()
        if "0.self_attn.q_proj" in k and k.endswith("bias")
    )
    torch.testing.assert_close(total.to_dense(name), trained * 3 / 2)
    total.save(tmp_path / "d")
    agree(dense(load(tmp_path / "d", llama)), dense(total))
    alone = logits(load(a, llama).apply(llama))
    torch.testing.assert_close(logits((0.5 * load(a, llama) * 2).apply(llama)), alone)
    with pytest.raises(InputError, match=r"q_proj.bias, which .* does not have"):
        (Dense(llama, ()) + total).apply(llama)
    dora = load(trained_in(tmp_path / "c", llama, use_dora=True), llama)
    with pytest.raises(InputError, match="PEFT has no adapter with biases beside B and DoRA"):
        (total + dora).save(tmp_path / "e")


def test_classifiers_count_from_zero_and_need_a_model_that_has_them(llama, tmp_path):
    def head(value):
        def change(tensors):
            tensors["base_model.model.score.weight"] = torch.full((2, 16), value)

        return change

    source = trained_in(tmp_path / "a", llama)
    one = with_tensors(source, tmp_path / "one", head(1.0))
    two = with_tensors(source, tmp_path / "two", head(3.0))
    for folder in (one, two):
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**config, "task_type": "SEQ_CLS"}))
    mean = 0.5 * load(one, llama) + 0.5 * load(two, llama)
    assert mean.to_dense("score.weight").eq(2).all()
    mean.save(tmp_path / "d")
    config = json.loads((tmp_path / "d" / CONFIG).read_text())
    assert (config["task_type"], config["modules_to_save"]) == ("SEQ_CLS", ["score"])
    assert load(tmp_path / "d", llama).to_dense("score.weight").eq(2).all()
    with pytest.raises(InputError, match=r"changes score.weight, which .* does not have"):
        mean.apply(llama)


def test_changes_without_factors_are_no_adapter(llama, tmp_path):
    with pytest.raises(InputError, match="no tensor by factors, so there is no adapter to write"):
        LowRank(llama, {}).save(tmp_path / "d")


def test_half_a_module_is_held_with_the_base_s_other_half(gpt2, tmp_path):
    folder = trained_in(tmp_path / "a", gpt2, target_modules=["c_attn"])
    name = "transformer.ln_f.weight"
    held = Dense(gpt2, ((1.0, HeldChange({name: torch.ones(16)})),))
    total = load(folder, gpt2) + LowRank(gpt2, {}, rest=held)
    total.save(tmp_path / "d")
    wanted = {**merged(folder, gpt2), name: torch.ones(16).double()}
    agree(merged(tmp_path / "d", gpt2), wanted)


# Factors.


def random_factors(seed, out, into, rank):
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(*shape, generator=generator) for shape in ((rank, into), (out, rank)))
    return Factors(a, b, 0.7)


def test_layouts_that_differ_are_brought_together():
    one, other = random_factors(1, 6, 6, 2), random_factors(2, 6, 6, 3)
    other = replace(other, transposed=True)
    for a, b in ((one, other), (other, one)):
        torch.testing.assert_close(a.joined(b).dense(), one.dense() + other.dense())
        wanted = float((one.dense().double() * other.dense().double()).sum())
        assert a.dot(b) == pytest.approx(wanted, rel=1e-5)
    rows, weight = torch.arange(6.0), torch.randn(6, 6)
    scaled = replace(one, rows=rows)
    wanted = scaled.dense(weight) + other.dense()
    for total in (scaled.joined(other), other.joined(scaled)):
        torch.testing.assert_close(total.dense(weight), wanted)
    with pytest.raises(InputError, match="disagree on which side"):
        scaled.joined(replace(other, rows=rows))


def test_magnitudes_without_a_direction_still_count():
    """DoRA with alpha 0 changes lengths alone."""
    weight = torch.randn(5, 4)
    silent = replace(random_factors(1, 5, 4, 2), scale=0.0, rows=torch.arange(5.0))
    other = random_factors(2, 5, 4, 2)
    wanted = torch.arange(5.0)[:, None] * weight + other.dense()
    for total in (silent.joined(other), other.joined(silent)):
        torch.testing.assert_close(total.dense(weight), wanted)


# Truncation.


@given(
    seed=st.integers(0, 99),
    out=st.integers(1, 12),
    into=st.integers(1, 12),
    ranks=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    rank=st.integers(1, 14),
)
@settings(max_examples=60)
def test_truncation_is_the_nearest_matrix_of_that_rank(seed, out, into, ranks, rank):
    total = random_factors(seed, out, into, ranks[0]).joined(
        random_factors(seed + 1, out, into, ranks[1])
    )
    u, s, v = np.linalg.svd(total.b.double().numpy() @ total.a.double().numpy() * total.scale)
    wanted = (u[:, : len(s)][:, :rank] * s[:rank]) @ v[: len(s)][:rank]
    found, kept = total.truncated(rank)
    assert found.a.shape[0] == min(rank, out, into, sum(ranks))
    np.testing.assert_allclose(found.dense().numpy(), wanted, atol=2e-5 * s[0])
    assert kept == pytest.approx((s[:rank] ** 2).sum() / (s**2).sum(), abs=1e-6)


def test_truncated_sums_are_what_peft_s_svd_makes_of_them(biased, tmp_path):
    from peft import PeftModel

    every = {"target_modules": ["q_proj", "up_proj"], "lora_alpha": 4}
    a = trained_in(tmp_path / "a", biased, seed=1, r=4, **every)
    b = trained_in(tmp_path / "b", biased, seed=2, r=4, **every)
    model = PeftModel.from_pretrained(biased.load(), a, adapter_name="a")
    model.load_adapter(b, adapter_name="b")
    model.add_weighted_adapter(["a", "b"], [0.5, 2.0], "d", combination_type="svd", svd_rank=3)
    small, kept = (0.5 * load(a, biased) + 2.0 * load(b, biased)).truncate(3)
    assert all(0 < part < 1 for part in kept.values())
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight"):
            name = f"{name.removeprefix('base_model.model.')}.weight"
            wanted = module.get_delta_weight("d")
            torch.testing.assert_close(small.to_dense(name), wanted, rtol=1e-4, atol=1e-5)
    small.save(tmp_path / "d")
    assert json.loads((tmp_path / "d" / CONFIG).read_text())["r"] == 3
    agree(dense(load(tmp_path / "d", biased)), dense(small), close=False)


def test_truncation_to_the_rank_at_hand_changes_nothing(biased, tmp_path):
    folder = trained_in(tmp_path / "a", biased, use_dora=True, bias="all")
    delta = load(folder, biased)
    small, kept = (delta + delta).truncate(2)
    agree(dense(small), dense(2 * delta))  # equal factors twice have the rank of one
    assert min(kept.values()) == pytest.approx(1.0)
    with pytest.raises(InputError, match="rank = 0: give at least 1"):
        delta.truncate(0)
    delta.truncate(8).delta.save(tmp_path / "d")
    assert (tmp_path / "d" / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()


# Real adapters.


@pytest.mark.parametrize(
    ("name", "modules", "scale", "heads"),
    [
        ("gemma3_270m_svg", 72, 16 / 4, set()),
        ("distilbert_imdb_lora", 12, 16 / 8, {"classifier", "pre_classifier"}),
        ("gpt2_lora_anirudh", 12, 8 / 8, {"score"}),
    ],
)
def test_real_adapters_are_read_and_summed(assets, name, modules, scale, heads):
    folder = assets / "adapters" / name
    factors = read_factors(folder)
    assert len(factors) == modules
    assert {own.scale for own in factors.values()} == {scale}
    held = read_adapter(folder).whole
    assert {tensor.rpartition(".")[0] for tensor in held} == heads
    own = factors[min(factors)]
    both, rank = own.joined(own.times(-0.5)), own.a.shape[0]
    assert both.a.shape[0] == 2 * rank
    small, kept = both.truncated(rank)
    torch.testing.assert_close(small.dense(), own.dense() / 2, rtol=1e-4, atol=1e-6)
    assert kept == pytest.approx(1.0)
