import itertools
import math

import numpy as np
import peft
import pytest
import torch

from deltaloom.core.encoding import encode_continuation, encode_prompt
from deltaloom.core.errors import InputError, WorkError
from deltaloom.core.examples import Examples
from deltaloom.core.method import Sizes
from deltaloom.core.registry import get
from deltaloom.measure.choice import Choice

WORDS = ["Paris", "London", "the city", "w1 w2 w3", "a", "b c d", "42", "1,000 w5"]


def questions(n=24):
    rng = np.random.default_rng(4)
    made = []
    for k in range(n):
        choices = rng.permutation(WORDS)[: 2 + k % 4].tolist()
        prompt = " ".join(
            rng.permutation(["what", "is", "the", "capital", "of", "w7"])[: 1 + k % 5]
        )
        made.append(
            {"prompt": f"{prompt} ", "choices": choices, "answer": k % len(choices), "id": f"q{k}"}
        )
    return made


def by_hand(model, tokenizer, data, normalise, logits_of):
    """Each choice alone, in float64; lists instead of arrays, max instead of argmax."""
    right = {}
    for example in data:
        prompt = encode_prompt(example, tokenizer)
        merits = []
        for text in example.choices:
            ids = encode_continuation(example, prompt, text, tokenizer)
            table = logits_of(model, prompt + ids)
            total = sum(table[len(prompt) + k - 1, token].item() for k, token in enumerate(ids))
            size = {"none": 1, "tokens": len(ids), "bytes": len(text.encode())}[normalise]
            merits.append(total / size)
        best = max(range(len(merits)), key=lambda k: (merits[k], -k))
        right[example.id] = float(example.choices[best] == example.answers[0])
    return right


@pytest.mark.parametrize("normalise", ["none", "tokens", "bytes"])
def test_equals_brute_force(normalise, tiny, rows, run, logits_of):
    data = rows(*questions())
    found = Choice(normalise=normalise).measure(tiny.model, tiny.tokenizer, data, run)
    wanted = by_hand(tiny.model, tiny.tokenizer, data, normalise, logits_of)
    assert dict(found.items) == wanted
    assert found.value == np.mean([*wanted.values()])
    names = {"none": "accuracy", "tokens": "accuracy_per_token", "bytes": "accuracy_per_byte"}
    assert (found.metric, found.better, found.interval) == (names[normalise], "higher", "wilson")


def test_the_three_normalisations_differ_here(tiny, rows, run):
    data = rows(*questions())
    found = [
        tuple(Choice(normalise=n).measure(tiny.model, tiny.tokenizer, data, run).items.values())
        for n in ("none", "tokens", "bytes")
    ]
    assert all(a != b for a, b in itertools.combinations(found, 2))


def test_delimiter(tiny, rows, run):
    spaced = rows({"prompt": "what ", "choices": ["a", "b"], "answer": "a"})
    plain = rows({"prompt": "what", "choices": ["a", "b"], "answer": "a"})
    wanted = Choice().measure(tiny.model, tiny.tokenizer, spaced, run).value
    assert Choice(delimiter=" ").measure(tiny.model, tiny.tokenizer, plain, run).value == wanted


def test_ties_go_to_the_lowest_index(tiny, rows, run):
    # Unknown words share one token, so these choices are exactly as probable.
    data = rows(
        {"prompt": "what ", "choices": ["zig", "zag", "zog"], "answer": "zig"},
        {"prompt": "what ", "choices": ["zig", "zag", "zog"], "answer": "zag"},
    )
    found = Choice().measure(tiny.model, tiny.tokenizer, data, run)
    assert [found.items[key] for key in data.ids] == [1.0, 0.0]


def test_choices_of_one_token_share_one_pass(tiny, rows, run):
    data = rows({"prompt": "what is ", "choices": ["a", "b", "c", "d"], "answer": 0})
    found = Choice().measure(tiny.model, tiny.tokenizer, data, run)
    assert found.cost["forward_tokens"] == 3.0 == run.record["cost"]["forward_tokens"]


def test_conversation(tiny, rows, run, logits_of):
    row = {
        "messages": [{"role": "user", "content": "what is a ?"}],
        "choices": ["Paris", "w1 w2"],
        "answer": 1,
    }
    data = rows(row)
    found = Choice().measure(tiny.model, tiny.tokenizer, data, run)
    assert dict(found.items) == by_hand(tiny.model, tiny.tokenizer, data, "none", logits_of)


def test_adapter(tiny, rows, run, logits_of):
    data = rows(*questions())
    config = peft.LoraConfig(r=4, lora_alpha=64, init_lora_weights=False, task_type="CAUSAL_LM")
    torch.manual_seed(0)
    model = peft.get_peft_model(tiny.model, config)
    found = Choice().measure(model, tiny.tokenizer, data, run)
    merged = model.merge_and_unload()
    assert dict(found.items) == by_hand(merged, tiny.tokenizer, data, "none", logits_of)


def test_empty_prompt_starts_from_bos_or_eos(tiny, rows, run, tokenizer_without_bos, logits_of):
    data = rows({"prompt": "", "choices": ["a", "b"], "answer": "a"})
    for tokenizer, start in ((tiny.tokenizer, 1), (tokenizer_without_bos, 2)):
        table = logits_of(tiny.model, [start])[0]
        a, b = tokenizer.convert_tokens_to_ids(["a", "b"])
        found = Choice().measure(tiny.model, tokenizer, data, run)
        assert found.value == float(table[a] > table[b])
    tokenizer_without_bos.eos_token = None
    with pytest.raises(InputError, match="line 1: the prompt is empty"):
        Choice().measure(tiny.model, tokenizer_without_bos, data, run)


def test_long_prompt_is_cut_alike_for_all_choices(small_context, tiny, rows, run, logits_of):
    prompt = " ".join(f"w{i}" for i in range(12)) + " "
    data = rows({"prompt": prompt, "choices": ["a", "b c d"], "answer": 0})
    found = Choice().measure(small_context, tiny.tokenizer, data, run)
    kept = encode_prompt(data[0], tiny.tokenizer)[-6:]  # 8 positions + 1 unread - 3 of b c d
    totals = []
    for text in ("a", "b c d"):
        ids = tiny.tokenizer(text, add_special_tokens=False)["input_ids"]
        table = logits_of(small_context, kept + ids[:-1])
        totals.append(sum(table[len(kept) + k - 1, t].item() for k, t in enumerate(ids)))
    assert found.value == float(totals[0] >= totals[1])
    assert run.record["notes"]["truncated_rows"] == 1
    long = rows({"prompt": "a ", "choices": ["a", " ".join(["b"] * 9)], "answer": 0})
    with pytest.raises(InputError, match="line 1: a choice has 9 tokens and at most 8 fit"):
        Choice().measure(small_context, tiny.tokenizer, long, run)


def test_clusters(tiny, rows, run):
    data = rows(*(dict(row, cluster=f"g{k // 3}") for k, row in enumerate(questions())))
    found = Choice().measure(tiny.model, tiny.tokenizer, data, run)
    assert found.interval.startswith("clustered")
    assert found.clusters["q4"] == "g1"


def test_bad_input(tiny, rows, run):
    def measure(data):
        return Choice().measure(tiny.model, tiny.tokenizer, data, run)

    with pytest.raises(InputError, match="holds no rows"):
        measure(Examples([], "empty"))
    good = questions(1)[0]
    with pytest.raises(InputError, match=r"q.jsonl line 2: has no 'choices'"):
        measure(rows(good, {"prompt": "what", "answer": "a"}))
    with pytest.raises(InputError, match=r"q.jsonl line 1: choice 2 has no tokens"):
        measure(rows({"prompt": "what", "choices": ["a", ""], "answer": "a"}))


def test_not_finite(tiny, rows, run):
    with torch.no_grad():
        tiny.model.model.embed_tokens.weight[tiny.tokenizer.convert_tokens_to_ids("w7")] = math.nan
        tiny.model.lm_head.weight = torch.nn.Parameter(torch.ones_like(tiny.model.lm_head.weight))
    data = rows(
        {"prompt": "a ", "choices": ["b", "c"], "answer": 0},
        {"prompt": "w7 ", "choices": ["b", "c"], "answer": 0},
    )
    with pytest.raises(WorkError, match=r"q.jsonl line 2: .* log-probability of nan"):
        Choice().measure(tiny.model, tiny.tokenizer, data, run)


def test_registered():
    assert get("measure", "choice").make({"normalise": "bytes"}) == Choice(normalise="bytes")


def test_plan():
    sizes = Sizes(100, 30.0, 0, 1000, 1200, 100, 4800, 0)
    assert Choice().work(sizes).forward_tokens == 12000.0
