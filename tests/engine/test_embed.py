"""`embeddings` against one row at a time, unpadded, in float64."""

import copy

import numpy as np
import peft
import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from deltaloom.core.encoding import Encoded
from deltaloom.engine.embed import embedding_width, embeddings

torch.set_num_threads(1)
VOCABULARY, HIDDEN = 61, 32
POOLINGS = ("mean", "weighted", "last")


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=HIDDEN, n_layer=2, n_head=4, initializer_range=0.3
    )
    return GPT2LMHeadModel(config).eval()


def opt():
    """Projects its last states from 48 to 32."""
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        word_embed_proj_dim=HIDDEN,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        init_std=0.3,
        do_layer_norm_before=False,
    )
    return OPTForCausalLM(config).eval()


def lora():
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(llama(), config)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data.normal_(std=0.5)
    return model.eval()


def prompt():
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    return peft.get_peft_model(llama(), config).eval()


def prefix():
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(llama(), config)
    for weight in model.prompt_encoder.parameters():
        weight.data.normal_()
    return model.eval()


MODELS = (llama, gpt2, opt, lora, prompt, prefix)


def ragged(n=13, seed=0):
    rng = np.random.default_rng(seed)
    rows = [rng.integers(0, VOCABULARY, k).tolist() for k in rng.integers(1, 40, n)]
    return [Encoded(f"r{i}", ids, [1] * len(ids)) for i, ids in enumerate(rows)]


def oracle(model, rows, pooling):
    """transformers' own hidden states of every row alone, pooled by the definition in float64."""
    exact = copy.deepcopy(model).double()
    found = []
    for row in rows:
        with torch.no_grad():
            out = exact(input_ids=torch.tensor([row.input_ids]), output_hidden_states=True)
        states = out.hidden_states[-1][0, -len(row.input_ids) :].numpy()  # (T, h)
        place = np.arange(1, len(states) + 1)
        if pooling == "mean":
            found.append(states.sum(0) / len(states))
        elif pooling == "weighted":
            found.append((place[:, None] * states).sum(0) / place.sum())
        else:
            found.append(states[-1])
    return np.array(found)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("tokens_per_batch", [1, 97, None])
def test_equals_one_row_at_a_time_in_float64(make, pooling, tokens_per_batch):
    model, rows = make(), ragged()
    got = embeddings(model, rows, 7, pooling, tokens_per_batch)
    assert got.dtype == np.float32
    assert got.shape == (13, embedding_width(model)) == (13, HIDDEN)
    np.testing.assert_allclose(got, oracle(model, rows, pooling), rtol=0, atol=2e-5)


def test_an_adapter_and_virtual_tokens_count():
    plain, rows = embeddings(llama(), ragged(), 0), ragged()
    for make in (lora, prompt, prefix):
        assert np.abs(embeddings(make(), rows, 0) - plain).max() > 0.05


def test_neither_order_nor_company_nor_pad_token_matters():
    model, rows = llama(), ragged(20)
    whole = embeddings(model, rows, 0, "weighted")
    shuffled = np.random.default_rng(3).permutation(len(rows))
    again = embeddings(model, [rows[i] for i in shuffled], 33, "weighted", 150)
    np.testing.assert_allclose(again[np.argsort(shuffled)], whole, rtol=0, atol=1e-5)


def test_same_call_gives_same_bytes():
    a, b = (embeddings(llama(), ragged(), 0).tobytes() for _ in range(2))
    assert a == b


def test_bfloat16_states_are_pooled_in_float32():
    model, rows = llama().bfloat16(), ragged()
    got = embeddings(model, rows, 0, "mean", tokens_per_batch=1)
    for row, mine in zip(rows, got, strict=True):
        with torch.no_grad():
            out = model(torch.tensor([row.input_ids]), output_hidden_states=True)
        states = out.hidden_states[-1][0].double().numpy()
        np.testing.assert_allclose(mine, states.mean(0), rtol=1e-6, atol=1e-6)


def test_no_logits_are_made():
    model = llama()
    model.lm_head.register_forward_hook(lambda *_: pytest.fail("the output layer ran"))
    embeddings(model, ragged(), 0)


def test_nothing_stays_hooked():
    model = llama()
    embeddings(model, ragged(), 0)
    assert not model.model._forward_hooks


def test_batches_keep_their_budget_and_are_told():
    rows, calls, shapes = ragged(30), [], []
    model = llama()
    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    embeddings(model, rows, 0, tokens_per_batch=100, on_batch=lambda *call: calls.append(call))
    assert sum(count for count, _ in calls) == 30
    assert sum(tokens for _, tokens in calls) == sum(len(row.input_ids) for row in rows)
    assert all(height * width <= 100 for height, width in shapes)
    widths = [width for _, width in shapes]
    assert widths == sorted(widths, reverse=True)
    assert len(shapes) < 30


def test_no_rows():
    assert embeddings(llama(), [], 0).shape == (0, HIDDEN)


def test_what_cannot_be_pooled_is_refused():
    with pytest.raises(ValueError, match="row 'e' has no tokens"):
        embeddings(llama(), [*ragged(2), Encoded("e", [], [])], 0)
    with pytest.raises(ValueError, match="pooling = 'max': must be one of mean, weighted, last"):
        embeddings(llama(), ragged(2), 0, "max")
