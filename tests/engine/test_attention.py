"""Attention to the user's tokens against softmaxes by hand in float64."""

import math

import numpy as np
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from deltaloom.core.base import Base
from deltaloom.core.errors import InputError
from deltaloom.engine.attention import Watched, steered, user_shares
from deltaloom.engine.generate import generate_greedily

ROWS = [
    Watched([1, 5, 6, 8, 17, 14, 2], [0, 1, 1, 0, 0, 0, 0], [[4, 5], [6]]),
    Watched([1, 9, 7], [0, 1, 0], [[2]]),
    Watched([1, 5, 9, 12, 8, 4, 4, 6, 11, 2], [0, 1, 1, 1, 1, 0, 0, 1, 0, 0], [[5, 6], [8, 9]]),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny.base_in(folder, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.5)
    return Base(model=str(folder), device="cpu").load()


def by_hand(model, row, alpha=1.0):
    """Weights (layers, heads, T, T) in float64 and the logits, from the weights alone."""
    exact = {name: value.double() for name, value in model.state_dict().items()}
    config = model.config
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    size = config.hidden_size // heads
    length = len(row.ids)
    rope = config.rope_parameters["rope_theta"]
    angles = torch.arange(length)[:, None] / rope ** (torch.arange(0, size, 2) / size).double()
    angles = torch.cat([angles, angles], 1)

    def norm(x, name):
        scale = (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).rsqrt()
        return x * scale * exact[name]

    def turned(x):
        half = torch.cat([-x[..., size // 2 :], x[..., : size // 2]], -1)
        return x * angles.cos() + half * angles.sin()

    bias = torch.full((length, length), -math.inf).triu(1).double()
    bias = bias + math.log(alpha) * (1 - torch.tensor(row.user).double())
    x = exact["model.embed_tokens.weight"][torch.tensor(row.ids)]
    weights = []
    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}."
        h = norm(x, at + "input_layernorm.weight")
        q, k, v = (h @ exact[f"{at}self_attn.{n}_proj.weight"].T for n in "qkv")
        q = turned(q.view(length, heads, size).transpose(0, 1))
        k = turned(k.view(length, groups, size).transpose(0, 1))
        v = v.view(length, groups, size).transpose(0, 1)
        k, v = (one.repeat_interleave(heads // groups, 0) for one in (k, v))
        share = (q @ k.transpose(1, 2) / math.sqrt(size) + bias).softmax(-1)
        weights.append(share)
        mixed = (share @ v).transpose(0, 1).reshape(length, -1)
        x = x + mixed @ exact[at + "self_attn.o_proj.weight"].T
        h = norm(x, at + "post_attention_layernorm.weight")
        gate, up = (h @ exact[f"{at}mlp.{n}_proj.weight"].T for n in ("gate", "up"))
        x = x + (torch.nn.functional.silu(gate) * up) @ exact[at + "mlp.down_proj.weight"].T
    logits = norm(x, "model.norm.weight") @ exact["lm_head.weight"].T
    return torch.stack(weights), logits


@pytest.mark.parametrize("alpha", [1.0, 0.95, 0.1])
def test_shares_are_those_of_a_softmax_by_hand(model, alpha):
    found = user_shares(model, ROWS, 0, alpha=alpha)
    for row, groups in zip(ROWS, found, strict=True):
        weights, _ = by_hand(model, row, alpha)
        for queries, shares in zip(row.groups, groups, strict=True):
            own = (weights * torch.tensor(row.user).double()).sum(-1)[:, :, queries]
            np.testing.assert_allclose(shares.heads, own.mean(2), atol=2e-6)
            np.testing.assert_allclose(shares.dependency, own.max(1).values.mean(1), atol=2e-6)
    assert model.config._attn_implementation == "sdpa"


def test_chosen_layers_and_batches_change_nothing(model):
    whole = user_shares(model, ROWS, 0)
    seen = []
    one = user_shares(model, ROWS, 3, [1], tokens_per_batch=1, on_batch=lambda *n: seen.append(n))
    for a, b in zip(whole, one, strict=True):
        for x, y in zip(a, b, strict=True):
            np.testing.assert_allclose(x.heads[1:], y.heads, atol=1e-6)
    assert seen == [(1, 10), (1, 7), (1, 3)]


@pytest.mark.parametrize("kind", ["eager", "sdpa"])
@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_steered_logits_are_those_by_hand(model, kind, alpha):
    model.set_attn_implementation(kind)
    plain = []
    for row in ROWS:
        ids = torch.tensor([row.ids])
        with torch.no_grad():
            with steered(model, [row.user], alpha):
                got = model(input_ids=ids).logits[0]
            after = model(input_ids=ids).logits[0]
        wanted = by_hand(model, row, alpha)[1]
        assert torch.allclose(got.double(), wanted, atol=2e-4)
        assert torch.allclose(after.double(), by_hand(model, row)[1], atol=2e-4)
        plain.append(torch.allclose(got, after, atol=1e-5))
    assert plain == [alpha == 1] * 3
    model.set_attn_implementation("sdpa")


def greedy(model, row, alpha, new):
    """Generation by whole passes in float64; generated tokens are not the user's."""
    ids, user = list(row.ids), list(row.user)
    for _ in range(new):
        step = by_hand(model, Watched(ids, user, []), alpha)[1][-1]
        ids.append(int(step.argmax()))
        user.append(0)
        if ids[-1] == 2:
            break
    return ids[len(row.ids) :]


class Numbers:
    """A tokenizer that spells ids."""

    bos_token_id, eos_token_id, pad_token_id = 1, 2, 0

    def decode(self, ids, **options):
        return " ".join(map(str, ids))


@pytest.mark.parametrize("alpha", [1.0, 0.3])
def test_padded_generation_with_a_cache_is_steered_as_by_hand(model, alpha):
    user = [row.user for row in ROWS]

    def within(chosen, lengths):
        width = max(lengths)
        return steered(
            model,
            [[0] * (width - n) + user[i] for i, n in zip(chosen, lengths, strict=True)],
            alpha,
        )

    found = generate_greedily(model, Numbers(), [row.ids for row in ROWS], 6, within=within)
    for row, one in zip(ROWS, found, strict=True):
        wanted = greedy(model, row, alpha, 6)
        assert one.text == " ".join(str(k) for k in wanted if k != 2)


def test_virtual_tokens_are_nobodys(model, tmp_path):
    from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model

    for config in (PromptTuningConfig, PrefixTuningConfig):
        fresh = AutoModelForCausalLM.from_pretrained(model.config._name_or_path)
        torch.manual_seed(0)
        wrapped = get_peft_model(fresh, config(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
        row = Watched(ROWS[2].ids, ROWS[2].user, [list(range(len(ROWS[2].ids)))])
        everything = Watched(row.ids, [1] * len(row.ids), row.groups)
        ((own,),), ((all_,),) = (user_shares(wrapped, [r], 0) for r in (row, everything))
        assert (all_.heads < 0.999).all()  # the rest is the virtual tokens'
        ((less,),) = user_shares(wrapped, [row], 0, alpha=0.2)
        assert (own.heads <= all_.heads).all()
        # In the first layer the scores are the same, so a steered share has a closed form.
        first = Watched(row.ids, row.user, [[t] for t in range(len(row.ids))])
        (plain,), (down,) = (
            user_shares(wrapped, [first], 0),
            user_shares(wrapped, [first], 0, alpha=0.2),
        )
        for a, b in zip(plain, down, strict=True):
            share = a.heads[0]
            np.testing.assert_allclose(b.heads[0], share / (share + 0.2 * (1 - share)), atol=1e-5)
        assert (less.heads[0] > own.heads[0]).all()


def test_another_architecture_and_one_without_attention(model):
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(
        GPT2Config(vocab_size=24, n_positions=32, n_embd=16, n_layer=2, n_head=2)
    ).eval()
    found = user_shares(gpt2, ROWS, 0)
    gpt2.set_attn_implementation("eager")
    for row, groups in zip(ROWS, found, strict=True):
        made = gpt2(input_ids=torch.tensor([row.ids]), output_attentions=True).attentions
        own = torch.stack([(w[0] * torch.tensor(row.user)).sum(-1) for w in made])
        for queries, shares in zip(row.groups, groups, strict=True):
            np.testing.assert_allclose(shares.heads, own[:, :, queries].mean(2).detach(), atol=1e-6)
    layer = model.model.layers[0]
    kept = layer.self_attn.forward
    layer.self_attn.forward = lambda *args, **options: (kept(*args, **options)[0], None)
    try:
        with pytest.raises(InputError, match="1 of 2 blocks"):
            user_shares(model, ROWS, 0)
    finally:
        del layer.self_attn.forward
