"""DELIFT against utilities made one pair at a time in float64 with plain transformers."""

import json

import numpy as np
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from deltaloom.core.base import Base
from deltaloom.core.errors import InputError, WorkError
from deltaloom.core.examples import Examples
from deltaloom.select import _utility
from deltaloom.select.delift import Delift

HEAD = "Instruction:\nPlease generate a response to the following query"


@pytest.fixture(params=["template", "text"])
def setting(request, tmp_path):
    """A base whose tokenizer has a chat template or none, and a pool."""
    folder = tiny.base_in(tmp_path / "base", initializer_range=0.5)
    if request.param == "text":
        (folder / "chat_template.jinja").unlink()
    base = Base(model=str(folder))
    assert bool(base.tokenizer().chat_template) == (request.param == "template")
    return base, Examples.read(tiny.rows_in(tmp_path / "pool.jsonl", 12))


def prompt_text(base, row, shown=None):
    """What stands before the answer, written out by hand."""
    if base.tokenizer().chat_template:
        turn = "" if shown is None else f"<s> {shown.prompt}  : {shown.completion} </s> "
        return f"{turn}<s> {row.prompt}  : "
    if shown is None:
        return f"{HEAD}.\n\n\nQuery:\n{row.prompt}\n"
    example = f"Example:\n{shown.prompt}\n{shown.completion}"
    return f"{HEAD}, with the example as a guide.\n\n\n{example}\n\n\nQuery:\n{row.prompt}\n"


def by_hand(base, rows, demonstrations):
    """UF (n, m) by definition: one sequence at a time, float64."""
    model = AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float64).eval()
    tokenizer = base.tokenizer()

    def distance(row, shown=None):
        before, answer = (
            tokenizer(text, add_special_tokens=False)["input_ids"]
            for text in (prompt_text(base, row, shown), row.completion)
        )
        ids = torch.tensor([before + answer])
        with torch.no_grad():
            p = model(input_ids=ids).logits[0].softmax(-1)
        own = [p[t - 1, ids[0, t]].item() for t in range(len(before), ids.shape[1])]
        return np.linalg.norm(np.array(own) - 1) / len(own) ** 0.5

    return np.array([[distance(i) - distance(i, j) for j in demonstrations] for i in rows])


def plain(similar, count, low=0.0, cap=np.inf):
    """Greedy cover of similarities (points, candidates), without any laziness."""
    have, chosen = np.broadcast_to(low, len(similar)).copy(), []
    for _ in range(count):
        after = np.maximum(have[:, None], np.minimum(similar, np.reshape(cap, (-1, 1))))
        gains = (after - have[:, None]).sum(axis=0)
        gains[chosen] = -1
        chosen.append(int(gains.argmax()))
        have = after[:, chosen[-1]]
    return chosen


def long_answers(path):
    """Rows whose answers have several tokens."""
    rows = [
        {"id": f"{who}-{city}", "prompt": f"who lives in {city} ?", "completion": f"{who} , {who}"}
        for who, city in [("tom", "oslo"), ("anna", "rome"), ("lily", "lima"), ("ben", "oslo")]
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_every_pair_equals_the_definition(setting, tmp_path):
    base, pool = setting
    shown = Examples.read(long_answers(tmp_path / "shown.jsonl"))
    places = np.tile(np.arange(4), (12, 1))
    run = tiny.run_in(tmp_path / "run")
    found, unfit = _utility.utilities(run.work / "u", pool, shown, places, 64, base, run, "u")
    assert unfit == 0
    np.testing.assert_allclose(found, by_hand(base, pool, shown), atol=2e-6)
    np.testing.assert_allclose(  # answers of several tokens
        _utility.utilities(run.work / "v", shown, pool, places[:4] + 3, 64, base, run, "v")[0],
        by_hand(base, shown, pool)[:, 3:7],
        atol=2e-6,
    )
    assert found.min() < -1e-3 < 1e-3 < found.max()
    assert run.record["cost"]["forward_tokens"] > 0


def test_a_row_of_several_turns_is_asked_its_last(tmp_path):
    base = Base(model=str(tiny.base_in(tmp_path / "base")))
    turns = [("system", "yes"), ("user", "who ?"), ("assistant", "tom"), ("user", "where ?")]
    messages = [{"role": role, "content": text} for role, text in turns]
    rows = [
        {"messages": [*messages, {"role": "assistant", "content": "in oslo"}]},
        {"messages": [*messages[:1], *messages[3:], {"role": "assistant", "content": "rome"}]},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    one, two = Examples.read(path)
    tokenizer = base.tokenizer()
    ids, mask = _utility.Asker(tokenizer)(one, two)
    # the demonstration comes after the row's own system message and without its own
    wanted = "<s> yes <s> where ? : rome </s> <s> who ? : tom </s> <s> where ? : in oslo"
    assert tokenizer.decode(ids) == wanted
    assert tokenizer.decode([i for i, scored in zip(ids, mask, strict=True) if scored]) == "in oslo"


THINKING = (  # an empty thought before the last answer only, which no generation prompt shows
    "{% for m in messages %}<s> {% if m.role == 'assistant' and loop.last %}yes no {% endif %}"
    "{{ m.content }} </s> {% endfor %}{% if add_generation_prompt %}<s> {% endif %}"
)


def test_templates_that_rewrite_earlier_turns(tmp_path):
    base = Base(model=str(tiny.base_in(tmp_path / "base")))
    tokenizer = base.tokenizer()
    tokenizer.chat_template = THINKING
    one, two = Examples.read(tiny.rows_in(tmp_path / "pool.jsonl", 2))
    ids, mask = _utility.Asker(tokenizer)(one, two)
    text = "<s> where lives anna ? yes </s> <s> lima </s> <s> where lives tom ? </s> <s> yes no"
    assert tokenizer.decode(ids) == f"{text} oslo"
    assert tokenizer.decode([i for i, scored in zip(ids, mask, strict=True) if scored]) == "oslo"


def test_instruction_stage_with_all_pairs(setting, tmp_path):
    base, pool = setting
    gains = by_hand(base, pool, pool)
    run = tiny.run_in(tmp_path / "run")
    selection = Delift(count=4, neighbours=None).select(pool, run, target=None, base=base)
    wanted = plain(np.maximum(gains, 0), 4)
    assert selection.chosen.ids == [pool.ids[i] for i in wanted]
    alone = np.maximum(gains, 0).sum(axis=0)
    assert selection.scores.ids == pool.ids
    assert selection.scores.index["score"] == pytest.approx(alone.tolist(), abs=1e-4)
    assert set(selection.reasons) == set(selection.chosen.ids)
    assert run.record["notes"]["pairs"] == 144
    assert run.record["notes"]["pairs_too_long"] == 0
    scaled = (gains - gains.min()) / (gains.max() - gains.min())
    authors = Delift(count=4, neighbours=None, scaling="minmax")
    selection = authors.select(pool, tiny.run_in(tmp_path / "two"), target=None, base=base)
    assert selection.chosen.ids == [pool.ids[i] for i in plain(scaled, 4)]


def test_task_and_continual_stages(setting, tmp_path):
    base, pool = setting
    path = long_answers(tmp_path / "other.jsonl")
    other = Examples.read(path)
    gains, others = (np.maximum(by_hand(base, pool, each), 0) for each in (pool, other))
    task = Delift(count=5, neighbours=None, eta=0.5)
    selection = task.select(pool, tiny.run_in(tmp_path / "one"), target=other, base=base)
    wanted = plain(gains, 5, cap=0.5 * others.max(axis=1))
    assert selection.chosen.ids == [pool.ids[i] for i in wanted]
    continual = Delift(count=5, neighbours=None, given=str(path), nu=0.5)
    selection = continual.select(pool, tiny.run_in(tmp_path / "two"), target=None, base=base)
    wanted = plain(gains, 5, low=0.5 * others.max(axis=1))
    assert selection.chosen.ids == [pool.ids[i] for i in wanted]
    with pytest.raises(InputError, match="leave out one of them"):
        continual.select(pool, tiny.run_in(tmp_path / "three"), target=other, base=base)


def hidden_means(base, rows):
    """Mean last hidden states, one row at a time."""
    from deltaloom.core.encoding import encode

    model = AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float64).eval()
    found = []
    for row in encode(rows, base.tokenizer(), 64):
        with torch.no_grad():
            out = model(input_ids=torch.tensor([row.input_ids]), output_hidden_states=True)
        found.append(out.hidden_states[-1][0].mean(0).numpy())
    return np.array(found)


def test_neighbours_bound_the_cost_and_leave_the_rest_at_zero(setting, tmp_path):
    base, pool = setting
    run = tiny.run_in(tmp_path / "run")
    selection = Delift(count=3, neighbours=4).select(pool, run, target=None, base=base)
    assert run.record["notes"]["pairs"] == 12 * 4
    states = hidden_means(base, pool)
    states -= states.mean(axis=0)
    units = states / np.linalg.norm(states, axis=1, keepdims=True)
    cosines = units @ units.T
    places = np.argsort(-np.round(cosines, 5), axis=1, kind="stable")[:, :4]
    fourth, fifth = (-np.sort(-cosines, axis=1)[:, k] for k in (3, 4))
    assert (np.argmax(cosines, axis=1) == places[:, 0]).all()
    clear = fourth - fifth > 1e-5  # rows whose neighbours are no matter of rounding
    assert clear.sum() >= 6
    gains = np.maximum(by_hand(base, pool, pool), 0)
    kept = np.zeros_like(gains)
    np.put_along_axis(kept, places, np.take_along_axis(gains, places, axis=1), axis=1)
    if clear.all():
        assert selection.chosen.ids == [pool.ids[i] for i in plain(kept, 3)]
    all_of_them = [
        Delift(count=6, neighbours=k)
        .select(pool, tiny.run_in(tmp_path / f"run-{k}"), target=None, base=base)
        .chosen.ids
        for k in (12, 100, None)
    ]
    assert all_of_them[0] == all_of_them[1] == all_of_them[2]


def test_pairs_that_do_not_fit_count_as_no_gain(setting, tmp_path):
    base, pool = setting
    asked = _utility.Asker(base.tokenizer())
    lengths = np.array([[len(asked(i, j)[0]) for j in pool] for i in pool])
    alone = np.array([len(asked(i)[0]) for i in pool])
    limit = int(np.median(lengths))
    fits = (lengths <= limit) & (alone <= limit)[:, None]
    assert 0 < fits.sum() < fits.size
    run = tiny.run_in(tmp_path / "run")
    method = Delift(count=3, neighbours=None, max_length=limit)
    selection = method.select(pool, run, target=None, base=base)
    assert run.record["notes"]["pairs_too_long"] == (~fits).sum()
    gains = np.where(fits, np.maximum(by_hand(base, pool, pool), 0), 0)
    assert selection.scores.index["score"] == pytest.approx(gains.sum(axis=0).tolist(), abs=1e-4)
    with pytest.raises(InputError, match="none of the 144 pairs fits 2 tokens"):
        Delift(count=3, neighbours=None, max_length=2).select(
            pool, tiny.run_in(tmp_path / "two"), target=None, base=base
        )


def test_an_interrupted_run_goes_on_where_it_was(setting, tmp_path, monkeypatch):
    base, pool = setting
    monkeypatch.setattr(_utility, "SHARD_ROWS", 4)
    calls = []
    real = _utility.token_logprobs

    def interrupted(*arguments, **more):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments, **more)

    monkeypatch.setattr(_utility, "token_logprobs", interrupted)
    method = Delift(count=4, neighbours=5)
    with pytest.raises(KeyboardInterrupt):
        method.select(pool, tiny.run_in(tmp_path / "cut"), target=None, base=base)
    again = method.select(pool, tiny.run_in(tmp_path / "cut-again"), target=None, base=base)
    calls.clear()
    cut = tiny.run_in(tmp_path / "same")
    (tmp_path / "cut" / ".work" / "utilities").rename(cut.work / "utilities")
    calls.append(1)
    calls.append(1)  # only the second call of all is interrupted
    resumed = method.select(pool, cut, target=None, base=base)
    assert len(calls) - 2 == 2  # of three shards one was there
    assert resumed.chosen.ids == again.chosen.ids
    assert resumed.scores.index == again.scores.index
    stored = sorted((cut.work / "utilities").rglob("*.safetensors"))
    assert len(stored) == 3
    for path in stored:
        twin = tmp_path / "cut-again" / ".work" / path.relative_to(cut.work)
        assert path.read_bytes() == twin.read_bytes()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "tom lives"}, "needs a prompt and a response"),
        ({"prompt": "who ?"}, "needs a prompt and a response"),
        ({"messages": [{"role": "user", "content": "who ?"}]}, "must end with a question and"),
        ({"messages": [{"role": "assistant", "content": "tom"}]}, "must end with a question and"),
    ],
)
def test_rows_that_are_no_question_with_an_answer(row, message, tmp_path):
    base = Base(model=str(tiny.base_in(tmp_path / "base")))
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "who ?", "completion": "tom"}) + "\n" + json.dumps(row))
    with pytest.raises(InputError, match=f"rows.jsonl:2: .*{message}|line 2.*{message}"):
        Delift(count=1, neighbours=None).select(
            Examples.read(path), tiny.run_in(tmp_path / "run"), target=None, base=base
        )


def test_a_target_that_is_no_question_is_refused_before_any_pass(setting, tmp_path):
    base, pool = setting
    (tmp_path / "texts.jsonl").write_text(json.dumps({"text": "tom lives"}))
    run = tiny.run_in(tmp_path / "run")
    with pytest.raises(InputError, match="needs a prompt and a response"):
        Delift(count=1, neighbours=2).select(
            pool, run, target=Examples.read(tmp_path / "texts.jsonl"), base=base
        )
    assert not [*run.work.iterdir()]


def test_a_broken_model_names_the_row(setting, tmp_path, monkeypatch):
    base, pool = setting
    monkeypatch.setattr(
        _utility,
        "token_logprobs",
        lambda model, rows, pad, on_batch: [np.array([np.nan], np.float32)] * len(rows),
    )
    with pytest.raises(WorkError, match="row 'r0' has values that are not finite"):
        Delift(count=1, neighbours=None).select(
            pool, tiny.run_in(tmp_path / "run"), target=None, base=base
        )


def test_settings():
    with pytest.raises(InputError, match="scaling=minmax needs neighbours=null"):
        Delift.parse({"scaling": "minmax"}, "select delift")
