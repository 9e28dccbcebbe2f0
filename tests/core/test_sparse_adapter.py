"""Sparse adapters inside PEFT, against dense autograd and against plain arithmetic on weights."""

import copy
import itertools
import json
import os
import pickle
import subprocess
import sys

import pytest
import tiny
import torch
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftMixedModel,
    PeftModel,
    get_peft_model,
)
from safetensors.torch import load_file
from small import logits
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from deltaloom.core.adapters._sparse_product import Layout, add_product, gradient_at
from deltaloom.core.adapters.sparse import SparseConfig, SparseLinear, random_support, sparse_layers
from deltaloom.core.base import Base
from deltaloom.core.delta import load
from deltaloom.core.deltas.sparse import Sparse
from deltaloom.core.errors import InputError

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning:peft", "ignore::FutureWarning:transformers"
)

SETTINGS = {"task_type": "CAUSAL_LM", "target_modules": "all-linear", "density": 0.1}


def given(model, seed=0, scale=0.3, **config):
    """`model` with a sparse adapter whose values and places `seed` decides."""
    model = get_peft_model(model, SparseConfig(**{**SETTINGS, "seed": seed, **config}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in sparse_layers(model).values():
            values = layer.sparse_values["default"]
            values.copy_(torch.randn(values.shape, generator=generator) * scale)
    return model


def by_hand(base, *adapters):
    """`base` with the changes of adapters written into its weights one by one, in float32."""
    model = base.load(dtype="float32")
    weights = model.state_dict()
    for adapter in adapters:
        for name, layer in sparse_layers(adapter).items():
            flat = weights[f"{name}.weight"].view(-1)
            pairs = zip(
                layer.sparse_indices["default"], layer.sparse_values["default"], strict=True
            )
            for index, value in pairs:
                flat[int(index)] += value.detach()
    return model


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


# The product.


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("tokens", "out", "into", "count"), [(1, 3, 5, 4), (70, 33, 21, 90)])
def test_forward_and_backward_are_those_of_a_masked_dense_weight(
    dtype, transposed, tokens, out, into, count
):
    torch.manual_seed(0)
    shape = (into, out) if transposed else (out, into)
    layout = Layout(*shape, transposed)
    where = random_support(out * into, count, 1).int()
    values = torch.randn(count, dtype=torch.float64)
    x = torch.randn(2, tokens, into, dtype=torch.float64)
    y = torch.randn(2, tokens, out, dtype=torch.float64)
    up = torch.randn(2, tokens, out, dtype=torch.float64)

    wanted = [t.clone().requires_grad_() for t in (y, x, values)]
    dense = torch.zeros(shape, dtype=torch.float64).flatten()
    dense = dense.index_put((where.long(),), wanted[2]).view(shape)
    (wanted[0] + wanted[1] @ (dense if transposed else dense.T)).backward(up)

    kept = torch.float64 if dtype == torch.float64 else torch.float32
    found = [y.to(dtype), x.to(dtype), values.to(kept)]
    found = [t.clone().requires_grad_() for t in found]
    seen = []
    result = add_product(*found, where, layout, lambda g, x: seen.append((g, x)))
    result.backward(up.to(dtype))

    exact = y + x @ (dense if transposed else dense.T).detach()
    limits = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}
    near = {"rtol": limits[dtype], "atol": limits[dtype] * tokens**0.5 * 4}
    torch.testing.assert_close(result.detach().double(), exact, **near)
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.grad.dtype == ours.dtype
        torch.testing.assert_close(ours.grad.double(), theirs.grad, **near)
    ((g, flat),) = seen
    at = gradient_at(g, flat, where, layout)
    torch.testing.assert_close(at.double(), wanted[2].grad, **near)


def test_the_portable_path_agrees_with_the_compiled_loops(monkeypatch):
    from deltaloom.core.adapters import _sparse_product as product

    torch.manual_seed(0)
    where, values = random_support(60, 20, 0), torch.randn(20, requires_grad=True)
    x, y = torch.randn(7, 6, requires_grad=True), torch.randn(7, 10)
    layout, found = Layout(10, 6, False), []
    for compiled in (True, False):
        monkeypatch.setattr(product, "_compiles", lambda x, compiled=compiled: compiled)
        x.grad = values.grad = None
        result = add_product(y, x, values, where, layout, None)
        result.square().sum().backward()
        found.append((result.detach(), x.grad, values.grad))
    for a, b in zip(*found, strict=True):
        close(a, b)


def test_threads_change_nothing_but_rounding(monkeypatch):
    from deltaloom.core.adapters import _sparse_product as product

    torch.manual_seed(0)
    layout, where = Layout(40, 30, False), random_support(1200, 300, 0)
    values = torch.randn(300, requires_grad=True)
    x, y = torch.randn(500, 30, requires_grad=True), torch.randn(500, 40)
    found = []
    for threads in (1, 3):
        monkeypatch.setattr(product, "SERIAL", 0)
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        x.grad = values.grad = None
        result = add_product(y, x, values, where, layout, None)
        result.square().sum().backward()
        found.append((result.detach(), x.grad, values.grad))
    for a, b in zip(*found, strict=True):
        close(a, b)


def test_backward_saves_the_activations_and_the_elements_alone():
    layer = nn.Linear(64, 48)
    model = SparseLinear(layer.requires_grad_(False))
    model.update_layer("default", 30, [0])
    x, saved = torch.randn(5, 64, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        model(x).sum()
    own = {t.data_ptr() for t in (x, layer.weight, *model.parameters(), *model.buffers())}
    assert {t.data_ptr() for t in saved} <= own


# Inside PEFT.


def test_it_starts_as_the_base_and_trains_what_it_should(llama):
    model = get_peft_model(llama.load(), SparseConfig(**SETTINGS))
    assert torch.equal(logits(model), logits(llama.load()))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(".sparse_values.default" in name for name in trained)
    for layer in sparse_layers(model).values():
        where = layer.sparse_indices["default"]
        assert len(where) == int(0.1 * layer.layout.numel)
        assert where.dtype == torch.int32
        assert bool((where[1:] > where[:-1]).all())


def test_the_support_differs_by_seed_and_module_and_not_by_time(llama):
    def places(seed):
        model = get_peft_model(llama.load(), SparseConfig(**SETTINGS, seed=seed))
        return [layer.sparse_indices["default"].tolist() for layer in sparse_layers(model).values()]

    first, again, other = places(0), places(0), places(1)
    assert first == again
    assert first != other
    assert first[0] != first[len(first) // 2]  # q_proj of either layer


@pytest.mark.parametrize("low", [False, True], ids=["plain", "low_cpu_mem_usage"])
def test_peft_saves_and_loads_to_the_bit(llama, tmp_path, low):
    model = given(llama.load(), seed=3)
    wanted = logits(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama.load(), tmp_path, low_cpu_mem_usage=low)
    for name, layer in sparse_layers(model).items():
        other = sparse_layers(again)[name]
        assert torch.equal(other.sparse_indices["default"], layer.sparse_indices["default"])
        assert torch.equal(other.sparse_values["default"], layer.sparse_values["default"])
    assert torch.equal(logits(again), wanted)
    assert not any(p.requires_grad for p in again.parameters())
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert {str(t.dtype) for t in stored.values()} == {"torch.int32", "torch.float32"}


def test_every_loader_knows_it(llama, tmp_path):
    model = given(llama.load(), seed=3)
    model.save_pretrained(tmp_path)
    wanted = logits(model)
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded.to(model.device)), wanted)
    plain = AutoModelForCausalLM.from_pretrained(llama.model).to(model.device)
    plain.load_adapter(tmp_path)
    assert torch.equal(logits(plain), wanted)
    second = given(llama.load(), seed=9)
    second.load_adapter(tmp_path, "other")
    second.set_adapter("other")
    assert torch.equal(logits(second), wanted)


def test_configs_pickle_and_copy(llama):
    model = get_peft_model(llama.load(), SparseConfig(**SETTINGS))
    config = model.peft_config["default"]
    assert pickle.loads(pickle.dumps(config)) == config
    assert copy.deepcopy(config).peft_type.value == "DELTALOOM_SPARSE"


def test_without_this_package_the_error_names_it(llama, tmp_path):
    given(llama.load()).save_pretrained(tmp_path)
    code = (
        "from peft import PeftModel; from transformers import AutoModelForCausalLM as A;"
        f"PeftModel.from_pretrained(A.from_pretrained({llama.model!r}), {str(tmp_path)!r})"
    )
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)
    assert done.returncode
    assert b"KeyError: 'DELTALOOM_SPARSE'" in done.stderr


def test_unmerging_restores_a_bfloat16_base_to_the_bit(llama):
    model = given(llama.load(dtype="bfloat16"), seed=1, scale=1e-3)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    model.merge_adapter()
    assert any(not torch.equal(model.state_dict()[name], t) for name, t in before.items())
    model.unmerge_adapter()
    assert all(torch.equal(model.state_dict()[name], t) for name, t in before.items())


def test_merging_adds_and_unmerging_restores_to_the_bit(llama):
    model = given(llama.load(), seed=1)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    apart = logits(model)
    model.merge_adapter(safe_merge=True)
    close(logits(model), apart)
    model.unmerge_adapter()
    after = model.state_dict()
    assert all(torch.equal(after[name], t) for name, t in before.items())
    whole = model.merge_and_unload()
    assert not any(isinstance(m, SparseLinear) for m in whole.modules())
    agree_with = by_hand(llama, given(llama.load(), seed=1))
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(tensor, agree_with.state_dict()[name], rtol=0, atol=0)


def test_two_adapters_are_the_sum_and_can_be_disabled(llama, tmp_path):
    one, other = given(llama.load(), seed=1), given(llama.load(), seed=2, density=0.3)
    other.save_pretrained(tmp_path)
    both = given(llama.load(), seed=1)
    both.load_adapter(tmp_path, "other")
    both.base_model.set_adapter(["default", "other"])
    close(logits(both), logits(by_hand(llama, one, other)))
    before = {name: t.clone() for name, t in both.state_dict().items()}
    both.merge_adapter()
    close(logits(both), logits(by_hand(llama, one, other)))
    both.unmerge_adapter()
    assert all(torch.equal(both.state_dict()[name], t) for name, t in before.items())
    with both.disable_adapter():
        assert torch.equal(logits(both), logits(llama.load()))
    both.delete_adapter("other")
    assert torch.equal(logits(both), logits(one))


@pytest.mark.parametrize("order", list(itertools.permutations(["sparse", "lora"])))
def test_mixed_with_lora(llama, adapter, tmp_path, order):
    sparse = given(llama.load(), seed=1)
    sparse.save_pretrained(tmp_path / "sparse")
    folders = {"sparse": tmp_path / "sparse", "lora": adapter(target_modules=["q_proj", "up_proj"])}
    mixed = PeftMixedModel.from_pretrained(llama.load(), str(folders[order[0]]), order[0])
    mixed.load_adapter(str(folders[order[1]]), order[1])
    mixed.set_adapter(list(order))
    wanted = by_hand(llama, sparse)
    change = load(folders["lora"], llama)
    with torch.no_grad():
        for name in change.names():
            wanted.state_dict()[name] += change.to_dense(name).to(wanted.device)
    close(logits(mixed), logits(wanted))
    mixed.set_adapter("sparse")
    close(logits(mixed), logits(sparse))
    mixed.set_adapter(list(order))
    close(logits(mixed.merge_and_unload()), logits(wanted))


def test_mixed_with_lora_trains_both(llama):
    mixed = get_peft_model(llama.load(), SparseConfig(**SETTINGS), mixed=True)
    mixed.add_adapter("lora", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    mixed.set_adapter(["default", "lora"])
    ids = torch.tensor([[1, 4, 7, 9, 11]]).to(mixed.device)
    mixed(input_ids=ids, labels=ids).loss.backward()
    moved = [n for n, p in mixed.named_parameters() if p.grad is not None and p.grad.any()]
    kinds = {kind for kind in ("sparse_values", "lora_A", "lora_B") for n in moved if kind in n}
    assert kinds == {"sparse_values", "lora_A", "lora_B"}


def test_gpt2_whose_weights_lie_transposed(gpt2, tmp_path):
    model = given(gpt2.load(), seed=4)
    assert any(isinstance(layer.base_layer, Conv1D) for layer in sparse_layers(model).values())
    close(logits(model), logits(by_hand(gpt2, model)))
    model.save_pretrained(tmp_path)
    close(logits(load(tmp_path, gpt2).apply(gpt2)), logits(model))


def test_values_stay_float32_and_whole_beside_a_bfloat16_base(llama, tmp_path):
    from peft import get_peft_model

    base = llama.load(dtype="bfloat16")
    for autocast in (True, False):
        model = get_peft_model(
            copy.deepcopy(base), SparseConfig(**SETTINGS), autocast_adapter_dtype=autocast
        )
        values = [layer.sparse_values["default"] for layer in sparse_layers(model).values()]
        assert {v.dtype for v in values} == {torch.float32}
    # a change far below bfloat16's step at the weight still reaches the output
    layer = nn.Linear(4, 1, bias=False).to(torch.bfloat16).requires_grad_(False)
    layer.weight.fill_(1.0)
    sparse = SparseLinear(layer)
    sparse.update_layer("default", 1, [0])
    with torch.no_grad():
        sparse.sparse_values["default"].fill_(2.0**-12)
    x = torch.tensor([[1.0, -1.0, 1.0, -1.0]], dtype=torch.bfloat16)
    assert float(sparse(x).detach().abs()) == 2.0**-12
    assert bool((layer.weight + 2.0**-12 == layer.weight).all())


def test_a_model_of_other_shapes_is_refused(llama, tmp_path):
    given(llama.load()).save_pretrained(tmp_path / "a")
    wide = Base(model=str(tiny.base_in(tmp_path / "wide", intermediate_size=32)))
    with pytest.raises(ValueError, match=r"changes .*gate_proj of shape \[24, 16\], here it is"):
        PeftModel.from_pretrained(wide.load(), tmp_path / "a")
    shallow = Base(model=str(tiny.base_in(tmp_path / "shallow", num_hidden_layers=1)))
    with pytest.raises(ValueError, match=r"layers\.1\..* is no module of this model"):
        PeftModel.from_pretrained(shallow.load(), tmp_path / "a")


def test_modules_that_are_not_linear_are_refused(llama):
    with pytest.raises(TypeError, match="change Linear and Conv1D modules, not LlamaRMSNorm"):
        get_peft_model(llama.load(), SparseConfig(target_modules=["input_layernorm"]))


# As a delta.


def test_the_adapter_folder_is_the_delta(llama, tmp_path):
    model = given(llama.load(), seed=5)
    model.save_pretrained(tmp_path / "peft")
    delta = load(tmp_path / "peft", llama)
    assert isinstance(delta, Sparse)
    close(logits(delta.apply(llama)), logits(model))
    delta.save(tmp_path / "ours")
    again = PeftModel.from_pretrained(llama.load(), tmp_path / "ours")
    assert torch.equal(logits(again), logits(model))
    stored = [load_file(tmp_path / k / "adapter_model.safetensors") for k in ("peft", "ours")]
    assert stored[0].keys() == stored[1].keys()
    assert all(torch.equal(stored[0][key], stored[1][key]) for key in stored[0])
    assert (
        json.loads((tmp_path / "ours/adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"
    )


def test_a_sum_of_sparse_deltas_is_an_adapter_too(llama, tmp_path):
    folders = []
    for seed in (1, 2):
        folders.append(tmp_path / str(seed))
        given(llama.load(), seed=seed).save_pretrained(folders[-1])
    one, other = (load(folder, llama) for folder in folders)
    total = one + 0.5 * other
    total.save(tmp_path / "sum")
    model = PeftModel.from_pretrained(llama.load(), tmp_path / "sum")
    close(logits(model), logits(total.apply(llama)))
    assert isinstance(total - 0.5 * other, Sparse)


def test_what_peft_cannot_adapt_it_refuses_by_name(llama, tmp_path):
    from deltaloom.core.deltas.sparse import Elements

    elements = Elements(torch.tensor([1]), torch.tensor([2.0]), (16,))
    Sparse(llama, {"model.norm.weight": elements}).save(tmp_path)
    assert load(tmp_path, llama).norm() == 2.0
    with pytest.raises(TypeError, match="not LlamaRMSNorm"):
        PeftModel.from_pretrained(llama.load(), tmp_path)


def test_another_base_is_refused(llama, gpt2, tmp_path):
    given(llama.load()).save_pretrained(tmp_path)
    other = Base(model=str(tiny.base_in(tmp_path / "wide", intermediate_size=32)))
    with pytest.raises(InputError, match=r"has shape \[\d+, \d+\], the base .*wide"):
        load(tmp_path, other)
