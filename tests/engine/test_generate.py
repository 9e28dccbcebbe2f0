"""Generation against a hand-written greedy loop without cache, padding or batches."""

import copy

import numpy as np
import peft
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from deltaloom.core.errors import InputError
from deltaloom.engine.generate import cut_at_stop, generate_greedily

torch.set_num_threads(1)
VOCABULARY = 50
NEW = 12


@pytest.fixture
def tokenizer():
    words = {f"w{i}": i for i in range(VOCABULARY)}
    core = Tokenizer(models.WordLevel(words, unk_token="w0"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, padding_side="right")


def llama():
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def gpt2():
    torch.manual_seed(1)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
    )
    return GPT2LMHeadModel(config).eval()


def prompts(n=9):
    rng = np.random.default_rng(5)
    return [rng.integers(0, VOCABULARY, k).tolist() for k in rng.integers(1, 30, n)]


def greedy(model, prompt, new=NEW, ends=()):
    exact = copy.deepcopy(model).double()
    ids = list(prompt)
    while len(ids) < len(prompt) + new:
        with torch.no_grad():
            ids.append(int(exact(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] in ends:
            break
    return ids[len(prompt) :]


def words(ids):
    return " ".join(f"w{i}" for i in ids)


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("tokens_per_batch", [1, 90, 8192])
def test_equals_the_plain_loop(make, tokens_per_batch, tokenizer):
    model = make()
    found = generate_greedily(model, tokenizer, prompts(), NEW, tokens_per_batch=tokens_per_batch)
    assert [one.text for one in found] == [words(greedy(model, p)) for p in prompts()]
    assert all(one.new_tokens == NEW and not one.finished and not one.cut for one in found)
    assert [one.forward_tokens for one in found] == [len(p) + NEW - 1 for p in prompts()]


KINDS = {
    "lora": lambda: peft.LoraConfig(r=2, init_lora_weights=False, task_type="CAUSAL_LM"),
    "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize(
    ("make", "kind"), [(llama, kind) for kind in KINDS] + [(gpt2, "prompt"), (gpt2, "prefix")]
)
def test_adapters(make, kind, tokenizer):
    model = peft.get_peft_model(make(), KINDS[kind]()).eval()
    found = generate_greedily(model, tokenizer, prompts(), NEW)
    assert [one.text for one in found] == [words(greedy(model, p)) for p in prompts()]


def test_ends_at_end_tokens_of_tokenizer_and_model(tokenizer):
    model = llama()
    free = [greedy(model, p) for p in prompts()]
    first, second = free[0][2], free[1][3]
    tokenizer.eos_token = f"w{first}"
    model.generation_config.eos_token_id = [second]
    found = generate_greedily(model, tokenizer, prompts(), NEW)
    wanted = [greedy(model, p, ends={first, second}) for p in prompts()]
    assert [one.new_tokens for one in found] == [len(one) for one in wanted]
    for one, ids in zip(found, wanted, strict=True):
        assert one.text == words(i for i in ids if i not in {first, second})
        assert one.finished == (ids[-1] in {first, second})
    assert sum(one.finished for one in found) >= 2


def test_model_settings_for_sampling_are_set_aside_and_put_back(tokenizer):
    model = gpt2()
    plain = [one.text for one in generate_greedily(model, tokenizer, prompts(), NEW)]
    settings = model.generation_config
    settings.do_sample, settings.temperature, settings.repetition_penalty = True, 2.0, 9.0
    settings.min_new_tokens, settings.suppress_tokens, settings.max_length = 3, [1, 2, 3], 7
    before = settings.to_dict()
    assert [one.text for one in generate_greedily(model, tokenizer, prompts(), NEW)] == plain
    assert model.generation_config is settings
    assert settings.to_dict() == before


def test_stop_texts_end_a_row_early(tokenizer):
    model = llama()
    free = [greedy(model, p) for p in prompts()]
    stop = [words(free[0][4:6]), words(free[2][1:2]) + " "]
    found = generate_greedily(model, tokenizer, prompts(), NEW, stop)
    for one, ids in zip(found, free, strict=True):
        text, stopped = cut_at_stop(words(ids), stop)
        assert (one.text, one.finished) == (text, stopped)
    assert found[0].finished
    assert found[0].new_tokens <= 6
    assert found[0].text == cut_at_stop(words(free[0]), stop)[0]


def test_too_long_prompts_lose_their_beginning(tokenizer):
    model = gpt2()
    rng = np.random.default_rng(0)
    long, short = (rng.integers(0, VOCABULARY, k).tolist() for k in (80, 52))
    found = generate_greedily(model, tokenizer, [long, short], NEW)
    assert [one.cut for one in found] == [True, False]
    assert found[0].prompt_tokens == 64 - NEW
    assert found[0].text == words(greedy(model, long[-(64 - NEW) :]))
    assert found[1].text == words(greedy(model, short))


def test_tokenizer_is_not_touched(tokenizer):
    model = llama()
    generate_greedily(model, tokenizer, prompts(), 2)
    assert tokenizer.padding_side == "right"
    assert tokenizer.pad_token_id is None
    tokenizer.padding_side = "left"
    tokenizer.pad_token = "w9"
    assert generate_greedily(model, tokenizer, prompts(), 2)[0].text
    assert tokenizer.padding_side == "left"


def test_bfloat16(tokenizer):
    model = llama().bfloat16()
    one, two = (generate_greedily(model, tokenizer, prompts(), NEW) for _ in range(2))
    assert one == two


@pytest.mark.parametrize("new", [0, 64, 100])
def test_no_room(new, tokenizer):
    with pytest.raises(InputError, match=f"max_new_tokens = {new}: .* context of 64"):
        generate_greedily(llama(), tokenizer, prompts(), new)


def test_empty_prompt(tokenizer):
    with pytest.raises(InputError, match="prompt 2 has no tokens"):
        generate_greedily(llama(), tokenizer, [[1], []], 2)


def test_no_prompts(tokenizer):
    assert generate_greedily(llama(), tokenizer, [], 2) == []
