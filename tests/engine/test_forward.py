"""`token_logprobs` against one sequence at a time in float64, and the meter against arithmetic."""

import copy
import itertools

import numpy as np
import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from deltaloom.core.run import Run
from deltaloom.engine import forward
from deltaloom.engine.forward import budgeted, context_length, token_logprobs, unscored
from deltaloom.engine.meter import count_forward, count_training, matmul_parameters

torch.set_num_threads(1)
VOCABULARY = 61


def llama(tied=True, cls=LlamaForCausalLM):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        initializer_range=0.3,
        pad_token_id=None,
    )
    return cls(config).eval()


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3
    )
    return GPT2LMHeadModel(config).eval()


class Unsliced(LlamaForCausalLM):
    """A model of the kind that always gives all logits."""

    def forward(self, input_ids, attention_mask=None):
        return super().forward(input_ids, attention_mask=attention_mask)


MODELS = {
    "llama-tied": llama,
    "llama-untied": lambda: llama(tied=False),
    "gpt2": gpt2,
    "unsliced": lambda: llama(cls=Unsliced),
}


def sequences(n=12, seed=0):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, 40, n)
    return [
        (rng.integers(0, VOCABULARY, k).tolist(), (rng.random(k) < 0.4).astype(int).tolist())
        for k in lengths
    ]


def oracle(model, rows):
    """Plain and slow: every sequence alone, unpadded, in float64."""
    exact = copy.deepcopy(model).double()
    values = []
    for ids, mask in rows:
        with torch.no_grad():
            logits = exact(torch.tensor([ids])).logits[0][-len(ids) :]
        table = torch.log_softmax(logits, -1)
        values.append([table[t - 1, ids[t]].item() for t in range(1, len(ids)) if mask[t]])
    return values


def assert_same(got, wanted, tolerance=1e-5):
    assert [len(one) for one in got] == [len(one) for one in wanted]
    for mine, theirs in zip(got, wanted, strict=True):
        assert mine.dtype == np.float32
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("tokens_per_batch", [1, 97, 4096])
def test_equals_one_at_a_time_in_float64(name, tokens_per_batch):
    model, rows = MODELS[name](), sequences()
    assert_same(token_logprobs(model, rows, 7, tokens_per_batch), oracle(model, rows))


def test_neither_order_nor_company_nor_pad_token_matters():
    model, rows = gpt2(), sequences(20)
    whole = token_logprobs(model, rows, 0)
    shuffled = np.random.default_rng(3).permutation(len(rows))
    again = token_logprobs(model, [rows[i] for i in shuffled], 33, 150)
    assert_same([again[k] for k in np.argsort(shuffled)], whole)
    assert_same([token_logprobs(model, [row], 5)[0] for row in rows], whole)


def test_same_call_gives_same_bytes():
    model, rows = llama(), sequences()
    a, b = (np.concatenate(token_logprobs(model, rows, 0)) for _ in range(2))
    assert a.tobytes() == b.tobytes()


def test_bfloat16_model_has_float32_softmax():
    model, rows = llama().bfloat16(), sequences()
    got = token_logprobs(model, rows, 0, tokens_per_batch=1)
    for (ids, mask), mine in zip(rows, got, strict=True):
        assert mine.dtype == np.float32
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0]
        table = torch.log_softmax(logits.double(), -1)
        theirs = [table[t - 1, ids[t]].item() for t in range(1, len(ids)) if mask[t]]
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=0.1)  # the logits' own rounding
    # A value of log-softmax rounded to bfloat16 would have its last 16 bits clear.
    bits = np.concatenate(got).view(np.uint32)
    assert (bits & 0xFFFF).any()


def test_first_token_is_not_scored_and_is_counted():
    model = llama()
    rows = [([4, 5, 6], [1, 1, 1]), ([4], [1]), ([4, 5], [0, 0]), ([], []), ([4, 5], [1, 0])]
    got = token_logprobs(model, rows, 0)
    assert [len(one) for one in got] == [2, 0, 0, 0, 0]
    assert unscored(rows) == 3
    assert_same(got[:1], oracle(model, rows[:1]))


def test_mask_of_another_length_is_refused():
    with pytest.raises(ValueError, match="3 tokens has a mask of 2"):
        token_logprobs(llama(), [([1, 2, 3], [1, 1])], 0)


def test_shared_beginnings_are_computed_once():
    model = llama()
    prompt = [3, 1, 4, 1, 5]
    rows = [([*prompt, last], [0] * 5 + [1]) for last in (10, 20, 30)]
    rows += [([*prompt, 10, 11, 12], [0] * 5 + [1, 1, 0]), ([3, 1, 9], [0, 1, 1])]
    calls = []
    got = token_logprobs(model, rows, 0, on_batch=lambda *args: calls.append(args))
    assert_same(got, oracle(model, rows))
    assert [sum(part) for part in zip(*calls, strict=True)] == [5, len([*prompt, 10])]


def test_logits_only_where_needed(monkeypatch):
    model = llama()
    seen = []
    plain = LlamaForCausalLM.forward

    def spy(self, *args, logits_to_keep=0, **kwargs):
        seen.append(logits_to_keep)
        return plain(self, *args, logits_to_keep=logits_to_keep, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "forward", spy)
    token_logprobs(model, [(list(range(20)), [0] * 17 + [1, 0, 1])], 0)
    assert [one.tolist() for one in seen] == [[-3, -1]]


@pytest.mark.parametrize("name", ["llama-tied", "unsliced"])
def test_memory_bounds_change_nothing(name, monkeypatch):
    model, rows = MODELS[name](), sequences()
    wanted = oracle(model, rows)
    monkeypatch.setattr(forward, "LOGITS_PER_BATCH", 3 * VOCABULARY)
    monkeypatch.setattr(forward, "LOGITS_PER_BLOCK", VOCABULARY + 1)
    assert_same(token_logprobs(model, rows, 0), wanted)


ADAPTERS = {
    "lora": lambda: peft.LoraConfig(r=2, init_lora_weights=False, task_type="CAUSAL_LM"),
    "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
    "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize(
    ("make", "kind"), [(llama, kind) for kind in ADAPTERS] + [(gpt2, "prompt"), (gpt2, "prefix")]
)
def test_adapters(make, kind):
    model = peft.get_peft_model(make(), ADAPTERS[kind]()).eval()
    rows = sequences()
    assert_same(token_logprobs(model, rows, 0, 120), oracle(model, rows))
    assert context_length(model) == (64 if kind == "lora" else 59)
    bare, adapted = (np.concatenate(token_logprobs(one, rows, 0)) for one in (make(), model))
    assert np.abs(bare - adapted).max() > 1e-3


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 120))
def test_budget_is_kept_and_nothing_is_lost(widths, budget):
    batches = list(budgeted(widths, budget))
    assert list(itertools.chain(*batches)) == list(range(len(widths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(widths[i] for i in batch) <= budget


LAYER = 32 * 32 * 2 + 32 * 16 * 2 + 32 * 48 * 3  # q and o, k and v, the three of the MLP
LLAMA_N = 2 * LAYER + 32 * VOCABULARY
GPT2_N = 2 * (32 * 96 + 32 * 32 + 2 * 32 * 128) + 32 * VOCABULARY


def test_matmul_parameters():
    assert matmul_parameters(llama(tied=True)) == LLAMA_N
    assert matmul_parameters(llama(tied=False)) == LLAMA_N
    assert matmul_parameters(gpt2()) == GPT2_N
    lora = peft.get_peft_model(
        llama(), peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["o_proj"])
    )
    assert matmul_parameters(lora) == LLAMA_N + 2 * 2 * (32 + 32)


def test_matmul_parameters_of_experts():
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    attention = 32 * 32 * 2 + 32 * 16 * 2
    wanted = attention + 32 * 4 + 2 * 3 * 32 * 48 + 32 * VOCABULARY
    assert matmul_parameters(MixtralForCausalLM(config)) == wanted


def test_ledger(tmp_path):
    run = Run.open(tmp_path / "run", {"steps": []}, {}, seed=0)
    spent = count_forward(run, llama(), 10)
    assert spent == {"forward_tokens": 10.0, "flops": 20.0 * LLAMA_N}
    assert count_training(run, llama(), 5)["flops"] == 30.0 * LLAMA_N
    assert count_training(run, llama(), 5, trainable="adapter")["flops"] == 20.0 * LLAMA_N
    cost = run.record["cost"]
    assert (cost["forward_tokens"], cost["backward_tokens"]) == (20.0, 10.0)
    assert cost["flops"] == 70.0 * LLAMA_N
