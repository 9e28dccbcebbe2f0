"""Routing against models that have, and have not, the modules; gates against their law."""

import numpy as np
import pytest
import tiny
import torch

from deltaloom.core.adapters.bottleneck import BottleneckConfig
from deltaloom.core.errors import WorkError
from deltaloom.engine.routing import Router, draw

IDS = torch.tensor([[1, 5, 6, 7, 9], [1, 5, 0, 0, 0], [1, 9, 8, 7, 0]])
REAL = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0]])


def configs():
    from peft import LoraConfig, PrefixTuningConfig

    return {
        "lora": LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear"),
        "bottleneck": BottleneckConfig(task_type="CAUSAL_LM", bottleneck_size=3),
        "prefix": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.base_in(tmp_path_factory.mktemp("routing") / "base")


def models(folder, kind):
    """The base, and the base with trained-looking modules."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    base, tuned = (AutoModelForCausalLM.from_pretrained(folder).eval() for _ in range(2))
    tuned = get_peft_model(tuned, configs()[kind]).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    return base, tuned


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=REAL).logits[REAL.bool()]


@pytest.mark.parametrize("kind", ["lora", "bottleneck", "prefix"])
def test_all_on_is_the_tuned_model_and_all_off_the_base(folder, kind):
    base, tuned = models(folder, kind)
    plain = logits(tuned)
    router = Router(tuned)
    assert router.layers == 2
    router.gates = torch.ones(3, 2)
    assert torch.equal(logits(tuned), plain)
    router.gates = torch.zeros(3, 2)
    assert torch.allclose(logits(tuned), logits(base), atol=2e-6)
    assert not torch.allclose(plain, logits(base), atol=0.1)
    router.gates = None
    assert torch.equal(logits(tuned), plain)


@pytest.mark.parametrize("kind", ["lora", "bottleneck", "prefix"])
def test_each_layer_of_each_row_has_its_own_gate(folder, kind):
    """Brute force: the modules of closed layers are zeroed or hidden, one row at a time."""
    gates = torch.tensor([[1, 0], [0, 1], [0, 0]])
    _, tuned = models(folder, kind)
    router = Router(tuned)
    router.gates = gates
    found = logits(tuned)
    router.gates = None
    start = 0
    for row, own in enumerate(gates):
        length = int(REAL[row].sum())
        wanted = by_hand(folder, kind, IDS[row : row + 1, :length], own)
        assert torch.allclose(found[start : start + length], wanted, atol=2e-6), row
        start += length


def by_hand(folder, kind, ids, own):
    _, model = models(folder, kind)
    if kind == "prefix":
        return _prefix_by_hand(model, ids, own)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            layer = 0 if ".layers.0." in name else 1
            if ("lora_B" in name or "bottleneck_up" in name) and not own[layer]:
                parameter.zero_()
        return model(input_ids=ids).logits[0]


def _prefix_by_hand(model, ids, own):
    """The layers called one by one, each with the cache of its prefix or with none."""
    from transformers import DynamicCache

    inner = model.get_base_model().model
    prefix = model.get_prompt(1)
    length = ids.shape[1]
    hidden = inner.embed_tokens(ids)
    # Rotary positions are relative: a bypassed layer may count from the prefix's end as well.
    positions = torch.arange(4, 4 + length)[None]
    rotary = inner.rotary_emb(hidden, positions)
    causal = torch.full((length, length), float("-inf")).triu(1)
    with torch.no_grad():
        for number, layer in enumerate(inner.layers):
            cache, mask = None, causal
            if own[number]:
                cache = DynamicCache()
                keys, values = prefix.layers[number].keys, prefix.layers[number].values
                for k in range(number + 1):
                    cache.update(keys, values, k)
                mask = torch.cat([torch.zeros(length, 4), causal], dim=1)
            output = layer(
                hidden, attention_mask=mask[None, None], cache=cache, position_embeddings=rotary
            )
            hidden = output[0] if isinstance(output, tuple) else output
        return model.get_base_model().lm_head(inner.norm(hidden))[0]


def test_closed_modules_get_no_gradient(folder):
    _, tuned = models(folder, "lora")
    router = Router(tuned)
    router.gates = torch.tensor([[1, 0], [1, 0], [0, 0]])
    tuned.train()
    out = tuned(input_ids=IDS, attention_mask=REAL).logits
    out[2].square().sum().backward(retain_graph=True)
    lora = {n: p for n, p in tuned.named_parameters() if "lora_B" in n}
    assert all(p.grad.abs().max() == 0 for p in lora.values())
    out[0].square().sum().backward()
    for name, parameter in lora.items():
        assert (parameter.grad.abs().max() > 0) == (".layers.0." in name)


def test_recomputed_activations_see_the_same_gates(folder):
    grads = []
    for checkpointing in (False, True):
        _, tuned = models(folder, "lora")
        router = Router(tuned)
        tuned.train()
        if checkpointing:
            tuned.enable_input_require_grads()
            tuned.gradient_checkpointing_enable({"use_reentrant": False})
        router.gates = torch.tensor([[1, 0], [0, 1], [1, 1]])
        tuned(input_ids=IDS, attention_mask=REAL).logits.square().sum().backward()
        grads.append([p.grad for n, p in tuned.named_parameters() if "lora_" in n])
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_gates_follow_their_chances_and_their_key():
    chances = np.array([0.0, 0.25, 0.85, 1.0])
    many = draw(np.repeat(chances, 5000), 3, (7, 0, 4)).reshape(4, 5000, 3)
    share = many.mean(1)  # (4, 3)
    error = 4 * np.sqrt(chances * (1 - chances) / 5000)[:, None]
    assert (np.abs(share - chances[:, None]) <= error).all()
    # Layers are drawn apart from each other.
    assert abs(np.corrcoef(many[1, :, 0], many[1, :, 1])[0, 1]) < 0.06
    again, other = draw(chances, 3, (7, 0, 4)), draw(chances, 3, (7, 0, 5))
    assert (draw(chances, 3, (7, 0, 4)) == again).all()
    assert other.shape == (4, 3)


def test_what_cannot_be_routed_is_said(folder):
    _, tuned = models(folder, "lora")
    router = Router(tuned)
    router.gates = torch.ones(2, 2)
    with pytest.raises(WorkError, match="3 rows where the batch has 2"):
        logits(tuned)
