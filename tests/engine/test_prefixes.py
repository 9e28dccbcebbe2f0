"""Sequences that begin alike: found by brute force, scored as if alone."""

import numpy as np
import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_forward import MODELS, oracle

from deltaloom.engine import forward
from deltaloom.engine.forward import token_logprobs
from deltaloom.engine.prefixes import can_share, families, hosts

torch.set_num_threads(1)


def questions(n=7, seed=0):
    """Prompts with several answers of several tokens, some texts alone, some whole texts scored."""
    rng = np.random.default_rng(seed)
    rows = []
    for q in range(n):
        prompt = rng.integers(0, 61, rng.integers(3, 30)).tolist()
        for _ in range(rng.integers(2, 5)):
            answer = rng.integers(0, 61, rng.integers(1, 6)).tolist()
            whole = [1] * len(prompt) if q == 3 else [0] * len(prompt)
            rows.append((prompt + answer, whole + [1] * len(answer)))
        alone = rng.integers(0, 61, 12).tolist()
        rows.append((alone, rng.integers(0, 2, 12).tolist()))
    order = rng.permutation(len(rows))
    return [rows[i] for i in order]


@pytest.mark.parametrize("tokens_per_batch", [1, 40, 10_000])
@pytest.mark.parametrize("name", MODELS)
def test_values_are_those_of_each_alone(name, tokens_per_batch):
    model, rows = MODELS[name](), questions()
    seen, tokens = 0, 0

    def count(answered, computed):
        nonlocal seen, tokens
        seen, tokens = seen + answered, tokens + computed

    found = token_logprobs(model, rows, 0, tokens_per_batch=tokens_per_batch, on_batch=count)
    for ours, exact in zip(found, oracle(model, rows), strict=True):
        np.testing.assert_allclose(ours, exact, atol=2e-4)
    assert seen == sum(1 for one in found if len(one))
    if can_share(model):
        assert tokens < 0.7 * sum(len(ids) for ids, _ in rows)
    else:
        assert name == "unsliced"


def test_an_adapter_is_in_both_passes():
    torch.manual_seed(3)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(MODELS["llama-tied"](), config).eval()
    assert can_share(model)
    rows = questions(seed=1)
    for ours, exact in zip(token_logprobs(model, rows, 0), oracle(model, rows), strict=True):
        np.testing.assert_allclose(ours, exact, atol=2e-4)


def test_a_cache_that_is_not_plain_is_not_used(monkeypatch):
    from deltaloom.engine import _scoring

    model, rows = MODELS["llama-tied"](), questions(seed=2)
    shared = token_logprobs(model, rows, 0)
    monkeypatch.setattr(_scoring, "is_plain", lambda cache: False)
    for a, b in zip(shared, token_logprobs(model, rows, 0), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)


def test_who_cannot_share():
    model = MODELS["llama-tied"]()
    model.config.sliding_window = 8
    assert not can_share(model)
    prompt = peft.get_peft_model(
        MODELS["llama-tied"](), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    assert not can_share(prompt)


@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=7), min_size=1, max_size=12))
def test_families_begin_alike_and_save(inputs):
    chosen = list(hosts(inputs))
    found = families(inputs, chosen)
    members = [i for family in found for i in family.members]
    assert len(members) == len(set(members))
    assert set(members) <= set(chosen)
    for family in found:
        assert len(family.members) > 1
        beginnings = {tuple(inputs[i][: family.length]) for i in family.members}
        assert len(beginnings) == 1
        assert all(len(inputs[i]) > family.length for i in family.members)
        tokens = sum(len(inputs[i]) for i in family.members)
        assert family.length * (len(family.members) - 1) > 0.25 * tokens


def test_few_logits_at_once_change_nothing(monkeypatch):
    model, rows = MODELS["llama-tied"](), questions(seed=4)
    wanted = token_logprobs(model, rows, 0)
    monkeypatch.setattr(forward, "LOGITS_PER_BATCH", 61 * 8)
    most = []
    hook = lambda module, args, output: most.append(output.logits.numel())  # noqa: E731
    model.register_forward_hook(hook)
    for a, b in zip(wanted, token_logprobs(model, rows, 0), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)
    # one row alone may need more: a whole text of 30 tokens is scored among them
    assert max(most) <= 61 * 40


def test_budget_is_kept():
    model, rows = MODELS["llama-tied"](), questions(n=12)
    widths = []

    def watch(module, args, kwargs):
        widths.append(kwargs["input_ids"].numel())

    model.register_forward_pre_hook(watch, with_kwargs=True)
    token_logprobs(model, rows, 0, tokens_per_batch=64)
    assert max(widths) <= 2 * 64
