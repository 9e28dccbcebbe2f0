"""What is no delta, does not fit, or is of no kind that is known, is refused by name."""

import json
import shutil

import pytest
import torch
from changes import CONFIG, WEIGHTS, tuned_in, with_tensors
from small import adapter_in

from deltaloom.core.base import Base
from deltaloom.core.delta import load
from deltaloom.core.deltas.dense import Dense
from deltaloom.core.deltas.sparse import Sparse
from deltaloom.core.errors import InputError

# PEFT's advice on tied weights and flags, and a deprecation inside transformers.
pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning:peft", "ignore::FutureWarning:transformers"
)


# Adapters.


LORA = {"seed": 1}


def edited(source, folder, **changes):
    shutil.copytree(source, folder)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **changes}))
    return folder


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"trainable_token_indices": [1]}, r"trained token rows \(trainable_token_indices\)"),
        (
            {"modules_to_save": ["lm_head"], "ensure_weight_tying": True},
            r"saved whole and tied \(ensure_weight_tying\)",
        ),
        ({"layer_replication": [[0, 2]]}, r"replicated layers \(layer_replication\)"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights = 'pissa_niter_4' changes the"),
        ({"peft_type": "IA3"}, "adapter kind 'IA3' is not low-rank"),
        ({"peft_type": None}, "adapter kind None is not low-rank"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_other_adapters_are_refused_by_their_kind(llama, adapter, tmp_path, change, said):
    folder = edited(adapter(**LORA), tmp_path / "d", **change)
    with pytest.raises(InputError, match=said) as caught:
        load(folder, llama)
    assert f"{folder / CONFIG}: " in str(caught.value)


STEM = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(f"{STEM}.lora_A.weight"), "q_proj lacks lora_A or lora_B"),
        (
            lambda t: t.update({f"{STEM}.lora_magnitude_vector": torch.zeros(16)}),
            "has lora_magnitude_vector but adapter_config.json says use_dora = False",
        ),
        (
            lambda t: t.update({f"{STEM}.lora_B.bias": torch.zeros(16)}),
            "lora_B.bias is not a LoRA factor",
        ),
        (
            lambda t: t.update({f"{STEM}.lora_A.weight": torch.zeros(2, 3, 1, 1)}),
            "lora_A.weight is not a LoRA factor",
        ),
        (
            lambda t: t.update({f"{STEM}.lora_B.weight": torch.zeros(16, 3)}),
            "the factors of module .*q_proj do not fit together",
        ),
        (
            lambda t: t.update({"base_model.model.model.norm.weight": torch.zeros(3)}),
            r"model.norm.weight has shape \[3\], the base's model.norm.weight \[16\]",
        ),
        (lambda t: t.clear(), "holds no LoRA factors"),
    ],
    ids=["half", "dora", "bias", "convolution", "ranks", "resized", "empty"],
)
def test_tensors_that_are_no_factors_are_named(llama, adapter, tmp_path, change, said):
    folder = with_tensors(adapter(**LORA), tmp_path / "d", change)
    with pytest.raises(InputError, match=said) as caught:
        load(folder, llama)
    assert str(folder / WEIGHTS) in str(caught.value)


def test_resized_embeddings_beside_an_adapter_are_refused(llama, tmp_path):
    source = adapter_in(tmp_path / "a", llama, target_modules=["embed_tokens"])

    def train(tensors):
        (name,) = (name for name in tensors if name.endswith("base_layer.weight"))
        tensors[name][0, 0] += 1

    folder = with_tensors(source, tmp_path / "d", train)
    with pytest.raises(InputError, match="embeddings were resized or trained whole"):
        load(folder, llama)


def test_dora_without_its_magnitudes_is_refused(llama, adapter, tmp_path):
    folder = edited(adapter(**LORA), tmp_path / "d", use_dora=True)
    with pytest.raises(InputError, match="q_proj lacks lora_magnitude_vector but"):
        load(folder, llama)


# Bases and folders.


def test_deltas_of_different_bases_are_refused(llama, other_llama, adapter, tmp_path):
    one, other = load(adapter(), llama), load(adapter(base=other_llama), other_llama)
    whole = load(tuned_in(tmp_path / "tuned", llama), llama)
    few = Sparse(llama, {})
    for call in (
        lambda: one + other,
        lambda: one - other,
        lambda: one.dot(other),
        lambda: whole + other,
        lambda: other + whole,
        lambda: whole.dot(other),
        lambda: few + other,
        lambda: few.dot(other),
    ):
        with pytest.raises(InputError, match=r"deltas of different bases.*tune both from one") as e:
            call()
        assert llama.model in str(e.value)
        assert other_llama.model in str(e.value)


@pytest.mark.parametrize("kind", ["lowrank", "dense", "sparse"])
def test_a_delta_recorded_over_another_base_is_refused(llama, other_llama, adapter, tmp_path, kind):
    lowrank = load(adapter(), llama)
    delta = {"lowrank": lowrank, "dense": Dense(llama, ()) + lowrank, "sparse": Sparse(llama, {})}
    delta[kind].save(tmp_path / "d")
    with pytest.raises(InputError, match=r"is a delta over .*llama .*, not over .*other"):
        load(tmp_path / "d", other_llama)


def test_an_adapter_that_does_not_fit_is_refused(llama, gpt2, adapter, tmp_path):
    with pytest.raises(
        InputError, match=r"adapts model\.layers\.0\..* and nothing that .*gpt2 has"
    ):
        load(adapter(), gpt2)
    import tiny

    wide = Base(model=str(tiny.base_in(tmp_path / "wide", hidden_size=32)))
    with pytest.raises(InputError, match=r"q_proj.weight has shape \[16, 16\], the tensor in"):
        load(adapter(), wide)


def test_a_model_of_another_shape_is_refused(llama, tmp_path):
    import tiny

    with pytest.raises(InputError, match=r"tensor .* has shape \[.*\], the base"):
        load(tiny.base_in(tmp_path / "wide", hidden_size=32), llama)
    with pytest.raises(InputError, match=r"tensor model.layers.2.* is not in the base"):
        load(tiny.base_in(tmp_path / "deep", num_hidden_layers=3), llama)


def test_folders_that_are_no_delta_are_named(llama, tmp_path):
    with pytest.raises(InputError, match=f"{tmp_path}: neither an adapter, a model nor a delta"):
        load(tmp_path, llama)
    with pytest.raises(InputError, match="none: no such folder"):
        load(tmp_path / "none", llama)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        (CONFIG, "{\n'", "adapter_config.json line 2: not JSON"),
        (CONFIG, "[]", "adapter_config.json: must be an object"),
        ("delta.json", "{", "delta.json line 1: not JSON"),
        ("delta.json", "[]", "delta.json: does not say"),
        (WEIGHTS, "short", "is not a whole safetensors file"),
        (WEIGHTS, None, f"has no {WEIGHTS}; copy the adapter again"),
    ],
)
def test_broken_files_are_named(llama, adapter, tmp_path, name, text, said):
    folder = tmp_path / "d"
    shutil.copytree(adapter(), folder)
    if text is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(text)
    with pytest.raises(InputError, match=said):
        load(folder, llama)
