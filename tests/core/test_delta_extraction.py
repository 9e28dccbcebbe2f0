"""Extraction against NumPy's SVD, sorting, and the deltas that it is given."""

import json

import numpy as np
import pytest
import tiny
import torch
from changes import added, agree, dense, merged, trained_in
from hypothesis import given, settings
from hypothesis import strategies as st
from small import logits

from deltaloom.core.base import Base
from deltaloom.core.delta import load
from deltaloom.core.deltas.dense import Dense, HeldChange
from deltaloom.core.deltas.extraction import extract, largest, leading
from deltaloom.core.errors import InputError

# A deprecation inside transformers.
pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning:peft", "ignore::FutureWarning:transformers"
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "untied"
    return Base(model=str(tiny.base_in(folder, attention_bias=True, tie_word_embeddings=False)))


def tuned_over(base, folder, scale=0.1):
    model = base.load()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            weight += torch.randn(weight.shape, generator=generator) * scale
    model.save_pretrained(folder)
    return load(folder, base)


def decaying(out, into, power, seed=0):
    """A matrix whose singular values fall as i ** -power."""
    random = np.random.default_rng(seed)
    u, v = (np.linalg.qr(random.standard_normal((side, min(out, into))))[0] for side in (out, into))
    s = np.arange(1, min(out, into) + 1.0) ** -power
    return torch.tensor((u * s) @ v.T, dtype=torch.float32), s


@pytest.mark.parametrize("shape", [(200, 90), (90, 200)])
@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_a_randomized_svd_is_nearly_the_best(shape, power):
    matrix, s = decaying(*shape, power)
    left, right = leading(matrix, 6, seed=1)
    assert (left.shape, right.shape) == ((shape[0], 6), (6, shape[1]))
    error = float((matrix.double() - left.double() @ right.double()).square().sum())
    best = float((s[6:] ** 2).sum())
    assert best * (1 - 1e-6) - 1e-12 <= error <= 1.02 * best
    torch.testing.assert_close(left.norm(dim=0), right.norm(dim=1))


@given(
    values=st.lists(st.integers(-4, 4), min_size=1, max_size=30),
    density=st.floats(0.01, 1.0),
)
@settings(max_examples=150)
def test_the_largest_are_those_that_stable_sorting_puts_first(values, density):
    change = torch.tensor(values, dtype=torch.float32)
    keep = max(1, int(density * len(values)))
    order = sorted(range(len(values)), key=lambda i: (-abs(values[i]), i))[:keep]
    found = largest(change, keep)
    assert found.indices.tolist() == sorted(i for i in order if values[i] != 0)
    assert found.values.tolist() == [values[i] for i in found.indices.tolist()]


def test_full_rank_and_full_density_lose_nothing(base, tmp_path):
    tuned = tuned_over(base, tmp_path / "tuned")
    said = logits(tuned.apply(base))
    for kind, how in (("lowrank", {"rank": 64}), ("sparse", {"density": 1.0}), ("dense", {})):
        delta, kept = extract(tuned, kind, **how)
        assert delta.kind == kind
        assert kept.keys() == {*tuned.names()}
        assert min(kept.values()) == pytest.approx(1.0)
        agree(dense(delta), dense(tuned))
        delta.save(tmp_path / kind)
        agree(dense(load(tmp_path / kind, base)), dense(tuned))
        torch.testing.assert_close(logits(delta.apply(base)), said, rtol=1e-4, atol=1e-4)


def test_a_small_rank_is_the_best_of_its_rank_and_an_adapter_for_peft(base, tmp_path):
    tuned = tuned_over(base, tmp_path / "tuned")
    delta, kept = extract(tuned, "lowrank", rank=3)
    delta.save(tmp_path / "d")
    by_peft = merged(tmp_path / "d", base)
    for name, change in dense(tuned).items():
        if change.dim() == 1:
            torch.testing.assert_close(by_peft[name], change, rtol=1e-4, atol=1e-6)
            assert kept[name] == 1.0
            continue
        s = np.linalg.svd(change.numpy(), compute_uv=False)
        lost = float((by_peft[name] - change).square().sum())
        assert lost == pytest.approx((s[3:] ** 2).sum(), rel=1e-3)
        assert kept[name] == pytest.approx((s[:3] ** 2).sum() / (s**2).sum(), abs=1e-4)
    settings = json.loads((tmp_path / "d" / "adapter_config.json").read_text())
    assert settings["r"] == 3


def test_a_merged_adapter_is_found_again(base, tmp_path):
    folder = trained_in(tmp_path / "a", base, r=3, target_modules=["q_proj", "down_proj"])
    model = added(base, merged(folder, base))
    model.save_pretrained(tmp_path / "tuned")
    delta, kept = extract(load(tmp_path / "tuned", base), "lowrank", rank=3)
    assert sorted(delta.names()) == sorted(merged(folder, base))  # nothing else changed
    assert min(kept.values()) == pytest.approx(1.0, abs=1e-6)
    agree(dense(delta), merged(folder, base))


@pytest.mark.parametrize("density", [0.01, 0.25])
def test_few_elements_are_the_largest_of_each_tensor(base, tmp_path, density):
    tuned = tuned_over(base, tmp_path / "tuned")
    delta, kept = extract(tuned, "sparse", density=density)
    for name, change in dense(tuned).items():
        flat = change.flatten().abs().sort(descending=True).values
        count = max(1, int(density * len(flat)))
        assert len(delta.elements[name].indices) == count
        wanted = float((flat[:count] ** 2).sum() / (flat**2).sum())
        assert kept[name] == pytest.approx(wanted, rel=1e-6)
    torch.testing.assert_close(logits(delta.apply(base)), logits(added(base, dense(delta))))


def test_conv1d_and_embeddings_become_adapters_that_peft_reads(gpt2, tmp_path):
    names = {
        "transformer.h.0.attn.c_attn.weight": (16, 48),
        "transformer.h.1.attn.c_proj.weight": (16, 16),
        "transformer.wpe.weight": (32, 16),
    }
    generator = torch.Generator().manual_seed(1)
    held = {name: torch.randn(shape, generator=generator) for name, shape in names.items()}
    tuned = Dense(gpt2, ((1.0, HeldChange(held)),))
    delta, kept = extract(tuned, "lowrank", rank=32)
    assert min(kept.values()) == pytest.approx(1.0)
    delta.save(tmp_path / "d")
    agree(merged(tmp_path / "d", gpt2), dense(tuned))


def test_embeddings_that_are_the_output_layer_too_are_left_out_and_told(llama, tmp_path):
    tuned = tuned_over(llama, tmp_path / "tuned")
    delta, kept = extract(tuned, "lowrank", rank=2)
    table = "model.embed_tokens.weight"
    assert (kept[table], table in delta.names()) == (0.0, False)
    assert extract(tuned, "sparse", density=0.5).kept[table] > 0.5


def test_the_same_seed_gives_the_same_factors():
    matrix, _ = decaying(120, 100, 0.5)
    first, again, other = (leading(matrix, 4, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize(
    ("kind", "how", "said"),
    [
        ("lowrank", {}, "give rank= for lowrank"),
        ("lowrank", {"rank": 2, "density": 0.5}, "give rank= for lowrank"),
        ("sparse", {"rank": 2}, "density= for sparse"),
        ("dense", {"density": 0.5}, "neither for dense"),
        ("lowrank", {"rank": 0}, "rank = 0: give at least 1"),
        ("sparse", {"density": 1.5}, r"density = 1.5: give a part above 0 and at most 1"),
    ],
)
def test_settings_of_another_kind_are_refused(llama, kind, how, said):
    with pytest.raises(InputError, match=said):
        extract(Dense(llama, ()), kind, **how)
