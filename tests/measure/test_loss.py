import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from deltaloom.core.encoding import encode
from deltaloom.core.errors import InputError, WorkError
from deltaloom.core.examples import Examples
from deltaloom.core.method import Sizes
from deltaloom.core.registry import get
from deltaloom.measure.loss import Loss

CITY = {"prompt": "what is the capital of France ?", "completion": "Paris"}
ROWS = (
    CITY,
    {"prompt": "what is a city ?", "completion": "Paris London Paris the city"},
    {"prompt": "the", "answer": "w3 w4"},
    {"text": "w1 w2 w3 w4 w5 w6"},
    {
        "messages": [
            {"role": "user", "content": "what is a ?"},
            {"role": "assistant", "content": "b c"},
        ]
    },
)


def by_hand(model, tokenizer, data, logits_of, max_length=64):
    losses, tokens = [], []
    for row in encode(data, tokenizer, max_length):
        table = logits_of(model, row.input_ids)
        found = [
            table[t - 1, row.input_ids[t]].item()
            for t in range(1, len(row.input_ids))
            if row.response_mask[t]
        ]
        losses.append(-np.mean(found))
        tokens.append(len(found))
    return np.array(losses), np.array(tokens)


def test_equals_the_formula(tiny, rows, run, logits_of):
    data = rows(*ROWS)
    losses, tokens = by_hand(tiny.model, tiny.tokenizer, data, logits_of)
    per_token = Loss().measure(tiny.model, tiny.tokenizer, data, run)
    assert per_token.value == pytest.approx((losses * tokens).sum() / tokens.sum(), abs=1e-5)
    assert (per_token.metric, per_token.better) == ("loss_per_token", "lower")
    assert per_token.interval == "ratio"
    assert per_token.weights == dict(zip(data.ids, map(float, tokens), strict=True))
    per_example = Loss(per="example").measure(tiny.model, tiny.tokenizer, data, run)
    assert per_example.value == pytest.approx(losses.mean(), abs=1e-5)
    assert per_example.metric == "loss_per_example"
    assert per_example.weights is None
    for k, key in enumerate(data.ids):
        assert per_example.items[key] == pytest.approx(losses[k], abs=1e-5)


def test_equals_the_loss_that_training_sees(tiny, rows, run):
    row = encode(rows(CITY), tiny.tokenizer, 64)[0]
    ids, mask = torch.tensor([row.input_ids]), torch.tensor([row.response_mask])
    wanted = tiny.model(ids, labels=ids.masked_fill(mask == 0, -100)).loss.item()
    found = Loss().measure(tiny.model, tiny.tokenizer, rows(CITY), run)
    assert found.value == pytest.approx(wanted, abs=1e-5)


def test_cost_is_in_estimate_and_ledger(tiny, rows, run):
    found = Loss().measure(tiny.model, tiny.tokenizer, rows(CITY), run)
    # <s>, seven words of the prompt, Paris; </s> is scored and never read.
    assert found.cost["forward_tokens"] == 9.0
    assert run.record["cost"]["forward_tokens"] == 9.0
    assert found.cost["flops"] == run.record["cost"]["flops"] > 0


def test_order_does_not_matter(tiny, rows, run):
    ids = [dict(row, id=f"r{k}") for k, row in enumerate(ROWS)]
    one = Loss().measure(tiny.model, tiny.tokenizer, rows(*ids), run)
    two = Loss().measure(tiny.model, tiny.tokenizer, rows(*reversed(ids)), run)
    assert list(one.items) == list(two.items)
    np.testing.assert_allclose([*one.items.values()], [*two.items.values()], atol=1e-5)


def test_training_mode_and_dropout_are_off(tiny, rows, run):
    tiny.model.train()
    Loss().measure(tiny.model, tiny.tokenizer, rows(CITY), run)
    assert not tiny.model.training


def test_truncated_like_training(tiny, rows, run, logits_of):
    data = rows(*ROWS[:2])
    found = Loss(per="example", max_length=5).measure(tiny.model, tiny.tokenizer, data, run)
    losses, _ = by_hand(tiny.model, tiny.tokenizer, data, logits_of, max_length=5)
    assert found.value == pytest.approx(losses.mean(), abs=1e-5)
    assert run.record["notes"]["truncated_rows"] == 2


def test_first_token_without_bos(tiny, rows, run, tokenizer_without_bos, logits_of):
    data = rows({"text": "w1 w2 w3"}, CITY)
    found = Loss().measure(tiny.model, tokenizer_without_bos, data, run)
    assert found.weights == {data.ids[0]: 3.0, data.ids[1]: 2.0}  # w2 w3 </s>; Paris </s>
    losses, _ = by_hand(tiny.model, tokenizer_without_bos, data, logits_of)
    assert found.items[data.ids[0]] == pytest.approx(losses[0], abs=1e-5)
    assert run.record["notes"]["unscored_first_tokens"] == 1


def test_row_with_nothing_before_it_is_missing(tiny, rows, run, tokenizer_without_bos):
    tokenizer_without_bos.eos_token = None
    data = rows({"text": "w1"}, {"text": "w1 w2"})
    found = Loss().measure(tiny.model, tokenizer_without_bos, data, run)
    assert (found.n, found.missing) == (1, 1)
    with pytest.raises(InputError, match=r"no row of q.jsonl has a scored token"):
        Loss().measure(tiny.model, tokenizer_without_bos, rows({"text": "w1"}), run)


@pytest.mark.parametrize(
    ("groups", "interval"),
    [("aabbc", "clustered-ratio"), ("aaaaa", "ratio"), ("abcde", "ratio")],
)
def test_clusters(groups, interval, tiny, rows, run):
    data = rows(*(dict(row, cluster=g) for row, g in zip(ROWS, groups, strict=True)))
    assert Loss().measure(tiny.model, tiny.tokenizer, data, run).interval == interval


def test_some_rows_without_group(tiny, rows, run):
    data = rows(
        {**CITY, "cluster": "x"}, {**ROWS[1], "cluster": "x"}, {"prompt": "a", "answer": "b"}
    )
    assert Loss().measure(tiny.model, tiny.tokenizer, data, run).clusters is None


def test_bfloat16(tiny, rows, run):
    exact = Loss().measure(tiny.model, tiny.tokenizer, rows(*ROWS), run).value
    rough = Loss().measure(tiny.model.bfloat16(), tiny.tokenizer, rows(*ROWS), run).value
    assert rough == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_loss_that_is_not_finite_names_the_row(wrong, tiny, rows, run):
    with torch.no_grad():
        tiny.model.model.embed_tokens.weight[tiny.tokenizer.convert_tokens_to_ids("w9")] = wrong
    with pytest.raises(WorkError, match=r"q.jsonl line 2: .* log-probability of nan"):
        Loss().measure(
            tiny.model, tiny.tokenizer, rows({"text": "w1 w2"}, {"text": "w9 w3 w4"}), run
        )


def test_bad_input(tiny, rows, run):
    with pytest.raises(InputError, match="holds no rows"):
        Loss().measure(tiny.model, tiny.tokenizer, Examples([], "empty"), run)
    with pytest.raises(InputError, match=r"q.jsonl line 1: the row has no answer"):
        Loss().measure(tiny.model, tiny.tokenizer, rows({"prompt": "a"}), run)
    with pytest.raises(InputError, match="max_length = 65: the model's context is 64 tokens"):
        Loss(max_length=65).measure(tiny.model, tiny.tokenizer, rows(CITY), run)
    with pytest.raises(ValidationError):
        Loss(max_length=1)


def test_registered():
    entry = get("measure", "loss")
    assert entry.summary.startswith("Cross-entropy")
    assert entry.paper.startswith("none")
    assert entry.make({"per": "example"}) == Loss(per="example")


def test_plan():
    sizes = Sizes(100, 30.0, 0, 1000, 1200, 100, 4800, 0)
    assert Loss(max_length=20).work(sizes).forward_tokens == 2000.0
