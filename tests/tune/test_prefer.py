"""Preferences: KTO and DPO against their formulas, every form of row, and what is refused."""

import json
import random

import pytest
import tiny
import torch
from safetensors.torch import load_file

from deltaloom.core.base import Base
from deltaloom.core.errors import InputError
from deltaloom.core.examples import Examples
from deltaloom.core.method import Evaluation
from deltaloom.core.registry import get
from deltaloom.tune._preferences import Judged, Pair, read, unpaired
from deltaloom.tune.prefer import Prefer

pytest.importorskip("trl")


@pytest.fixture
def base(tmp_path):
    return Base(model=str(tiny.base_in(tmp_path / "base")))


def examples(tmp_path, rows, name="rows.jsonl"):
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Examples.read(path)


def pairs_in(tmp_path, count=6):
    rows = [
        {"prompt": f"where lives {tiny.PEOPLE[i % 6]} ?" + " yes" * (i // 6),
         "chosen": " oslo", "rejected": " rome : lima" if i % 2 else " lima"}
        for i in range(count)
    ]  # fmt: skip
    return examples(tmp_path, rows)


def logp(model, tokenizer, prompt, answer):
    """Sum of the answer's log-probabilities and that of the end, in float64."""
    before = tokenizer(prompt)["input_ids"]
    ids = before + tokenizer(answer, add_special_tokens=False)["input_ids"] + [2]
    logits = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(logits[t - 1, ids[t]] for t in range(len(before), len(ids)))


def by_hand(loss, base, run, pairs, seed, beta=0.1):
    """The loss of all rows after the first step, whose weights are in the first checkpoint."""
    tokenizer, models = base.tokenizer(), []
    for path in (base.folder, run.work / "checkpoints" / "checkpoint-1"):
        model = base.load(dtype="float32")
        found = load_file(path / "model.safetensors")
        model.load_state_dict(found, strict=False)
        model.tie_weights()
        models.append(model.double().eval())

    def h(prompt, answer):
        with torch.no_grad():
            old, new = (logp(model, tokenizer, prompt, answer) for model in models)
        return float(new - old)

    sigmoid = torch.nn.Sigmoid()
    if loss == "dpo":
        margins = [h(p.prompt, p.chosen) - h(p.prompt, p.rejected) for p in pairs]
        return sum(-float(sigmoid(torch.tensor(beta * m)).log()) for m in margins) / len(margins)
    rows = list(unpaired(pairs, []))
    random.Random(f"preferences {seed}").shuffle(rows)
    mismatched = [rows[k - 1].completion for k in range(len(rows))]
    kl = sum(h(one.prompt, y) for one, y in zip(rows, mismatched, strict=True)) / len(rows)
    kl = max(kl, 0.0)
    total = 0.0
    for one in rows:
        own = h(one.prompt, one.completion)
        gap = beta * (own - kl) if one.label else beta * (kl - own)
        total += 1 - float(sigmoid(torch.tensor(gap)))
    return total / len(rows)


@pytest.mark.parametrize("loss", ["kto", "dpo"])
def test_the_loss_is_the_published_one(loss, base, tmp_path):
    data = pairs_in(tmp_path)
    run = tiny.run_in(tmp_path / "run", seed=5)
    method = Prefer(
        loss=loss, tuned="full", lr=1e-2, epochs=2, batch_size=12, save_steps=1,
        schedule="constant_with_warmup", warmup=0,
    )  # fmt: skip
    method.tune(base, data, run)
    logged = [json.loads(one) for one in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert logged[0]["loss"] == pytest.approx({"kto": 0.5, "dpo": 0.6931}[loss], abs=1e-3)
    wanted = by_hand(loss, base, run, read(data, 5)[0], 5)
    assert logged[1]["loss"] == pytest.approx(wanted, abs=2e-4)
    assert abs(logged[1]["loss"] - logged[0]["loss"]) > 1e-2


def test_what_is_preferred_becomes_more_probable_and_the_folder_is_an_adapter(base, tmp_path):
    from deltaloom.core.origin import Origin

    data = pairs_in(tmp_path, 12)
    run = tiny.run_in(tmp_path / "run", seed=5)
    held = examples(
        tmp_path,
        [{"prompt": f"where lives {who} ?", "choices": [" oslo", " lima"], "answer": 0}
         for who in tiny.PEOPLE], "held.jsonl",
    )  # fmt: skip
    measure = get("measure", "choice").make()
    method = Prefer(r=2, lr=5e-2, epochs=4, batch_size=8)
    method.tune(base, data, run, evaluation=Evaluation(measure, held))
    model, tokenizer = Origin(base, str(run.folder)).load()
    found = measure.measure(model, tokenizer, held, tiny.run_in(tmp_path / "m"))
    before = measure.measure(base.load(), tokenizer, held, tiny.run_in(tmp_path / "m0"))
    assert found.value == 1 > before.value
    assert not [path for path in run.folder.iterdir() if path.name == "ref"]
    names = {*load_file(run.folder / "adapter_model.safetensors")}
    assert all("lora_" in name for name in names)
    assert run.record["notes"]["pairs"] == 12


def test_every_form_of_row_is_read(tmp_path):
    user = {"role": "user", "content": "who ?"}
    good, bad = ({"role": "assistant", "content": one} for one in ("tom", "sue"))
    rows = [
        {"prompt": "who ?", "chosen": "tom", "rejected": "sue"},
        {"chosen": [user, good], "rejected": [user, bad]},
        {"prompt": "who ?", "chosen": [user, good], "rejected": [user, bad]},
        {"prompt": [user], "chosen": [good], "rejected": [bad]},
        {"messages": [user], "chosen": "tom", "rejected": "sue"},
        {"prompt": "who ?", "candidates": ["max", "tom", "sue"], "scores": [0.5, 0.9, 0.1]},
        {"prompt": "who ?", "choices": ["tom", "sue"], "answer": 0},
        {"prompt": "who ?", "completion": "tom", "label": True},
        {"prompt": "who ?", "completion": "sue", "label": "false"},
        {"messages": [user, bad], "label": 0},
        {"prompt": [user], "completion": [good], "label": True},
    ]
    pairs, judged = read(examples(tmp_path, rows), 0)
    text = ("who ?", "tom", "sue")
    spoken = ([user], [good], [bad])
    found = [(one.prompt, one.chosen, one.rejected) for one in pairs]
    assert found == [text, spoken, spoken, spoken, spoken, text, text]
    assert [(one.completion, one.label) for one in judged] == [
        ("tom", True), ("sue", False), ([bad], False), ([good], True),
    ]  # fmt: skip
    assert len(list(unpaired(pairs, judged))) == 18
    assert all(isinstance(one, Pair) for one in pairs)
    assert isinstance(judged[0], Judged)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "q", "completion": "a"}, "says no preference"),
        ({"prompt": "q", "chosen": "a"}, "'rejected' is missing"),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "are the same"),
        ({"prompt": "q", "chosen": "a", "rejected": " "}, "'rejected' is empty"),
        ({"prompt": "q", "chosen": "a", "rejected": 3}, "must be a text or a list"),
        ({"prompt": " ", "chosen": "a", "rejected": "b"}, "has no 'prompt'"),
        ({"prompt": "q", "completion": "a", "label": "maybe"}, "'label' is 'maybe'"),
        ({"prompt": "q", "label": True}, "no 'completion'"),
        ({"prompt": "q", "candidates": ["a", "b"], "scores": [1]}, "a number for each"),
        ({"prompt": "q", "candidates": ["a", "b"], "scores": [1, 1]}, "no candidate is better"),
        ({"prompt": "q", "candidates": ["a"], "scores": [1]}, "at least two texts"),
        ({"chosen": [{"role": "user", "content": "q"}], "rejected": "b"}, "must be one"),
    ],
)
def test_bad_rows_are_named(row, says, tmp_path):
    fine = {"prompt": "q", "chosen": "a", "rejected": "b"}
    with pytest.raises(InputError, match="line 2") as error:
        read(examples(tmp_path, [fine, row]), 0)
    assert says in str(error.value)


def test_conversations_use_the_chat_template(base, tmp_path):
    user = [{"role": "user", "content": "where lives tom ?"}]
    rows = [{"messages": user, "chosen": "oslo", "rejected": "lima"}] * 4
    run = tiny.run_in(tmp_path / "run", seed=5)
    Prefer(loss="dpo", r=2, lr=1e-2, batch_size=4).tune(base, examples(tmp_path, rows), run)
    assert run.record["notes"]["rows"] == 4
    cost = run.record["cost"]
    assert cost["forward_tokens"] == 2 * cost["backward_tokens"]  # the reference's too


def test_what_does_not_go_together_is_refused(base, tmp_path):
    run = tiny.run_in(tmp_path / "run")
    one = {"prompt": "q", "completion": "a", "label": True}
    with pytest.raises(InputError, match=r"line 1: a labelled answer is no pair; loss = dpo"):
        Prefer(loss="dpo").tune(base, examples(tmp_path, [one]), run)
    with pytest.raises(InputError, match="micro_batch at least 2"):
        Prefer(micro_batch=1).tune(base, pairs_in(tmp_path), run)
    with pytest.raises(InputError, match="longer than 2 tokens"):
        Prefer(max_length=2).tune(base, pairs_in(tmp_path), run)
    with pytest.raises(InputError, match="needs label_smoothing"):
        Prefer.parse({"loss": "robust"}, "tune prefer")
