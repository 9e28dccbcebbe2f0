"""Composite adapters: each part against its formula, and what PEFT writes and reads back."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny import base_in
from transformers import AutoModelForCausalLM

from deltaloom import Base
from deltaloom.core.adapters.composite import CompositeConfig, CompositeLayer
from deltaloom.core.delta import load
from deltaloom.core.errors import InputError
from deltaloom.tune.lora import save_adapter

torch.set_num_threads(1)
IDS = torch.tensor([[1, 5, 6, 7, 8], [1, 9, 10, 11, 12]])


@pytest.fixture
def folder(tmp_path):
    return base_in(tmp_path / "base")


def attached(folder, **sizes):
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
    return get_peft_model(model, CompositeConfig(task_type="CAUSAL_LM", **sizes)).eval()


def stirred(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "composite_" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    return model


def test_all_but_the_prefix_begin_by_changing_nothing(folder):
    plain = AutoModelForCausalLM.from_pretrained(folder)(IDS).logits
    new = attached(folder, serial=3, parallel=2, lora=2, sparse=1)
    torch.testing.assert_close(new(IDS).logits, plain)
    trained = {name for name, p in new.named_parameters() if p.requires_grad}
    assert trained
    assert all("composite_" in name for name in trained)
    stirred(new)
    assert not torch.allclose(new(IDS).logits, plain)
    with new.disable_adapter():
        torch.testing.assert_close(new(IDS).logits, plain)


def test_all_kinds_but_the_prefix_are_their_formulas(folder):
    sizes = {"serial": 3, "parallel": 2, "lora": 2, "sparse": 1}
    model = stirred(attached(folder, **sizes, layers_to_transform=[1]))
    layers = model.base_model.model.model.layers
    assert not isinstance(layers[0].mlp, CompositeLayer)
    mlp, attention = layers[1].mlp, layers[1].self_attn
    h = torch.randn(2, 4, 16)
    f = mlp.base_layer(h)
    down, _, up = mlp.composite_serial["default"]
    wanted = f + up(torch.nn.functional.gelu(down(f)))
    down, _, up = mlp.composite_parallel["default"]
    wanted = wanted + 4 * up(torch.nn.functional.gelu(down(h)))
    torch.testing.assert_close(mlp(h), wanted)
    query = attention.base_layer.q_proj
    a, b = attention.composite_lora["default"]["q_proj"]
    change = attention.composite_sparse["default"]["q_proj"]
    assert len(change.values) == 1 * (16 + 16)
    s = torch.zeros(16 * 16).index_put((change.indices.long(),), change.values).view(16, 16)
    assert (s != 0).sum() == 32
    wanted = h @ (query.weight + s).T + 2 * h @ a.weight.T @ b.weight.T
    torch.testing.assert_close(query(h), wanted)


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
@pytest.mark.parametrize("padded", [False, True])
def test_a_prefix_is_a_cache_of_those_keys_and_values(folder, kind, padded):
    """Against the stock model with a cache that holds the same vectors for every layer."""
    from transformers import DynamicCache

    model = stirred(attached(folder, prefix=3))
    model.base_model.model.set_attn_implementation(kind)
    stock = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=kind)
    cache = DynamicCache(config=stock.config)
    for number, layer in enumerate(model.base_model.model.model.layers):
        keys, values = layer.self_attn.composite_prefix["default"].detach()
        cache.update(keys[None].expand(2, -1, -1, -1), values[None].expand(2, -1, -1, -1), number)
    mask = torch.ones_like(IDS)
    if padded:
        mask[1, 3:] = 0
    # Its tokens keep their own places: the prefix has none.
    places = torch.arange(IDS.shape[1])[None].expand(2, -1)
    seen = torch.cat([torch.ones(2, 3, dtype=torch.long), mask], 1)
    wanted = stock(IDS, attention_mask=seen, past_key_values=cache, position_ids=places).logits
    got = model(IDS, attention_mask=mask).logits
    torch.testing.assert_close(got[mask.bool()], wanted[mask.bool()], rtol=1e-4, atol=1e-5)


def test_generation_with_a_cache_is_as_without(folder):
    model = stirred(attached(folder, prefix=2, lora=2, serial=2))
    how = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(IDS, use_cache=True, **how)
    assert cached.tolist() == model.generate(IDS, use_cache=False, **how).tolist()


def test_saved_and_loaded_it_is_the_same(folder, tmp_path):
    sizes = {"serial": 2, "parallel": 2, "lora": 1, "sparse": 2, "prefix": 2}
    model = stirred(attached(folder, **sizes, layers_to_transform=[1]))
    base, out = Base(model=str(folder)), tmp_path / "adapter"
    save_adapter(model, out, base, "composite")
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), out).eval()
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits)
    delta = load(out, base)
    assert delta.kind == "composite"
    torch.testing.assert_close(delta.apply(base)(IDS).logits, model(IDS).logits)
    with pytest.raises(InputError, match="a composite adapter is no change of the base's tensors"):
        delta.norm()
    with pytest.raises(ValueError, match="nothing to train"):
        CompositeConfig()
