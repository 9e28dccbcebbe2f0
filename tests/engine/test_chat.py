"""Chats: a tiny model, a real server with faults, and a file between."""

import json
import time

import numpy as np
import pytest
import tiny
import torch
from chat_server import serving

from deltaloom.core.base import Base
from deltaloom.core.errors import InputError
from deltaloom.core.spec import Spec
from deltaloom.engine.chat import BaseChat, Kept, Reply, Speaker, open_chat
from deltaloom.engine.endpoint import Endpoint, EndpointChat
from deltaloom.engine.generate import generate


def say(text):
    return [{"role": "user", "content": text}]


@pytest.fixture
def server():
    with serving(lambda messages, body: messages[-1]["content"].upper()) as running:
        yield running


PATIENCE = (5.0, 0.8)
"""Seconds for a quick answer on a busy machine, and for the one that comes later than that."""


def chat_at(server, **settings):
    given = {"url": server.url, "model": "m", "backoff": 0.01, "timeout": 5.0, **settings}
    return EndpointChat(Endpoint(**given))


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    base = Base(model=str(tiny.base_in(tmp_path_factory.mktemp("base"))))
    return base, base.load(), base.tokenizer()


def test_replies_come_in_order_with_their_tokens(server):
    texts = [f"t{i}" for i in range(20)]
    seen = []
    chat = chat_at(server)
    found = chat.replies(
        [say(t) for t in texts], max_new_tokens=9, on_reply=lambda i, r: seen.append((i, r.text))
    )
    assert [one.text for one in found] == [t.upper() for t in texts]
    assert sorted(seen) == [(i, t.upper()) for i, t in enumerate(texts)]
    assert {(one.tokens_in, one.tokens_out) for one in found} == {(7, 3)}
    body = server.bodies[0]
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("m", 9, 0.0)
    assert server.most <= 4


@pytest.mark.parametrize("fault", [408, 429, 500, 503, "truncated", "foreign", "slow"])
def test_what_may_pass_is_asked_again(server, fault):
    server.faults["a"] = [fault, fault]
    chat = chat_at(server, timeout=PATIENCE[fault == "slow"])
    assert chat.replies([say("a")], max_new_tokens=4)[0].text == "A"
    assert server.asked["a"] == 3


@pytest.mark.parametrize(
    ("fault", "why"),
    [(429, "HTTP 429: fault 429"), (500, "HTTP 500"), ("truncated", "no whole JSON"),
     ("foreign", "no choices"), ("slow", "no answer in 0.8 s")],
)  # fmt: skip
def test_what_does_not_pass_is_a_failed_reply(server, fault, why):
    server.faults["a"] = [fault] * 9
    chat = chat_at(server, timeout=PATIENCE[fault == "slow"], attempts=3)
    a, b = chat.replies([say("a"), say("b")], max_new_tokens=4)
    assert a.text is None
    assert why in a.failure
    assert b.text == "B"
    assert server.asked["a"] == 3


@pytest.mark.parametrize(
    ("fault", "why", "times"), [("refusal", "refused", 2), ("empty", "empty", 2), (400, "400", 1)]
)
def test_what_would_hardly_pass_is_asked_seldom(server, fault, why, times):
    server.faults["a"] = [fault] * 9
    (a,) = chat_at(server).replies([say("a")], max_new_tokens=4)
    assert a.text is None
    assert why in a.failure
    assert server.asked["a"] == times
    assert a.tokens_in == (0 if fault == 400 else 7 * times)


def test_a_second_thought_is_an_answer_and_both_are_paid(server):
    server.faults["a"] = ["refusal"]
    (a,) = chat_at(server).replies([say("a")], max_new_tokens=4)
    assert (a.text, a.tokens_in, a.tokens_out) == ("A", 14, 6)


@pytest.mark.parametrize("code", [401, 404, 307])
def test_what_every_call_would_get_stops_at_once(server, code):
    server.faults = {f"t{i}": [code] for i in range(50)}
    chat = chat_at(server, concurrency=2)
    with pytest.raises(InputError, match=f"HTTP {code}"):
        chat.replies([say(f"t{i}") for i in range(50)], max_new_tokens=4)
    assert sum(server.asked.values()) < 10
    # and the chat can be used again
    assert chat.replies([say("x")], max_new_tokens=4)[0].text == "X"


def test_nobody_listens():
    chat = EndpointChat(Endpoint(url="http://127.0.0.1:9/v1", model="m", attempts=2, backoff=0.1))
    started = time.monotonic()
    with pytest.raises(InputError, match=r"9/v1#m: no connection .*; start the server"):
        chat.replies([say(f"t{i}") for i in range(1000)], max_new_tokens=4)
    assert time.monotonic() - started < 2


def test_a_server_that_went_away_is_waited_for_by_each_call():
    with serving(lambda messages, body: "here") as running:
        chat = chat_at(running, attempts=2)
        assert chat.replies([say("a")], max_new_tokens=4)[0].text == "here"
    (a,) = chat.replies([say("a")], max_new_tokens=4)
    assert a.text is None
    assert "no connection" in a.failure


def test_retry_after_is_honoured(server):
    server.faults["a"] = [(429, "0.4")]
    start = time.monotonic()
    assert chat_at(server).replies([say("a")], max_new_tokens=4)[0].text == "A"
    assert time.monotonic() - start >= 0.4


def test_calls_are_paced(server):
    chat, start = chat_at(server, requests_per_minute=600), time.monotonic()
    chat.replies([say(f"t{i}") for i in range(5)], max_new_tokens=4)
    assert max(server.times) - start >= 0.4


def test_the_key_comes_from_the_environment(server, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret")
    chat_at(server, key="MY_KEY").replies([say("a")], max_new_tokens=4)
    assert server.headers[0]["Authorization"] == "Bearer secret"
    monkeypatch.delenv("MY_KEY")
    chat_at(server, key="MY_KEY").replies([say("b")], max_new_tokens=4)
    assert "Authorization" not in server.headers[1]


def test_logprobs_of_an_endpoint(server):
    (a,) = chat_at(server).replies([say("a")], max_new_tokens=1, top_logprobs=2)
    assert a.logprobs == ({"A": -0.1, "B": -2.4},)


class Asking(Spec):
    who: Speaker


def test_names_of_speakers():
    url = "http://localhost:8000/v1#org/model"
    one = Asking.parse({"who": url}, "here").who
    assert (one.url, one.model) == ("http://localhost:8000/v1", "org/model")
    assert Asking.parse({"who": {"url": "http://h/v1", "model": "m"}}, "here").who.attempts == 6
    assert Asking.parse({"who": "org/model"}, "here").who == Base(model="org/model")
    again = Asking.parse(Asking.parse({"who": url}, "x").model_dump(mode="json"), "x")
    assert again.who == one
    shape = Asking.model_json_schema()["properties"]["who"]
    assert {"type": "string"} in shape["anyOf"]
    for wrong, why in (
        ("http://localhost:8000/v1", "#MODEL"),
        ("http://me:key@h/v1#m", "environment"),
        ({"url": "h", "model": "m"}, "address"),
        ({"url": "http://h", "model": "m", "tries": 3}, "tries"),
    ):
        with pytest.raises(InputError, match=why):
            Asking.parse({"who": wrong}, "here")


def test_a_base_answers_through_its_template(loaded):
    base, model, tokenizer = loaded
    chat = BaseChat(model, tokenizer, "tiny")
    talk = [say("who lives in oslo ?"), say("where lives tom ? yes yes")]
    found = chat.replies(talk, max_new_tokens=5)
    wanted = generate(model, tokenizer, [chat.prompt(one) for one in talk], 5)
    assert [one.text for one in found] == [one.text for one in wanted]
    assert tokenizer.decode(chat.prompt(talk[0])) == "<s> who lives in oslo ?"
    assert open_chat(base).replies(talk, max_new_tokens=5) == found
    # 64 positions: half of them is the most that can be written
    assert chat.replies(talk[:1], max_new_tokens=500)[0].tokens_out <= 32


def test_a_base_without_template_continues_the_text(loaded, tmp_path):
    _, model, _ = loaded
    tiny.tokenizer_in(tmp_path, template=False)
    tokenizer = Base(model=str(tmp_path)).tokenizer()
    chat = BaseChat(model, tokenizer, "tiny")
    talk = [*say("tom"), {"role": "assistant", "content": "anna"}, *say("lily")]
    assert tokenizer.decode(chat.prompt(talk)) == "tom anna lily"


def test_logprobs_of_a_base(loaded):
    _, model, tokenizer = loaded
    chat = BaseChat(model, tokenizer, "tiny")
    (one,) = chat.replies([say("tom")], max_new_tokens=1, top_logprobs=3)
    ids = torch.tensor([chat.prompt(say("tom"))])
    wanted = torch.log_softmax(model(input_ids=ids).logits[0, -1].detach(), 0).topk(3)
    assert list(one.logprobs[0].values()) == pytest.approx(wanted.values.tolist(), abs=1e-5)


def test_draws_follow_the_model_and_not_the_batch(loaded):
    _, model, tokenizer = loaded
    prompts = [[1, 5, 6], [1, 7], [1, 8, 9, 10, 11]]
    whole = generate(model, tokenizer, prompts, 6, temperature=1.0, seed=3)
    alone = [generate(model, tokenizer, [p], 6, temperature=1.0, seed=3)[0] for p in prompts]
    assert whole == alone
    assert whole != generate(model, tokenizer, prompts, 6, temperature=1.0, seed=4)
    # one token of one prompt, many seeds: the frequencies are the softmax
    exact = torch.softmax(model(input_ids=torch.tensor([[1, 5, 6]])).logits[0, -1] / 0.7, 0)
    names = [tokenizer.decode([i], skip_special_tokens=True) for i in range(len(exact))]
    draws = [
        generate(model, tokenizer, [[1, 5, 6]], 1, temperature=0.7, seed=s)[0].text
        for s in range(150)
    ]
    top = int(exact[4:].argmax()) + 4  # of the tokens that are no special ones
    share, p = np.mean([text == names[top] for text in draws]), float(exact[top].detach())
    assert abs(share - p) < 4 * (p * (1 - p) / 150) ** 0.5


def test_nothing_is_paid_for_twice(server, tmp_path):
    path = tmp_path / "calls.jsonl"
    run = tiny.run_in(tmp_path / "run")
    server.faults["b"] = [400]
    talk = [say("a"), say("b"), say("a")]
    first = Kept(chat_at(server), path)
    found = first.replies(talk, max_new_tokens=4)
    assert [one.text for one in found] == ["A", None, "A"]
    assert server.asked == {"a": 1, "b": 1}
    # the interruption comes before the ledger is written
    # an interruption cut the last line short
    with open(path, "ab") as file:
        file.write(b'{"key": "0123", "te')
    second = Kept(chat_at(server), path)
    found = second.replies(talk, max_new_tokens=4)
    assert [one.text for one in found] == ["A", "B", "A"]
    assert server.asked == {"a": 1, "b": 2}
    second.spend(run)
    second.spend(run)
    assert run.record["cost"]["endpoint_calls"] == 2
    assert run.record["cost"]["endpoint_tokens_in"] == 14
    # other parameters are another call, and every whole line is readable
    second.replies(talk[:1], max_new_tokens=4, seed=1)
    assert server.asked["a"] == 2
    third = Kept(chat_at(server), path)
    assert third.replies(talk, max_new_tokens=4) == found
    lines = path.read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines if not line.endswith('"te')]
    assert texts == [
        "A",
        "B",
        "A",
    ]


def test_an_interrupted_call_keeps_what_came(server, tmp_path):
    def stop_at_three(i, reply):
        time.sleep(0.05)  # as on a busy machine: no call may run ahead of what is kept
        if len(seen) == 3:
            raise KeyboardInterrupt
        seen.append(i)

    seen = []
    talk = [say(f"t{i}") for i in range(30)]
    chat = Kept(chat_at(server, concurrency=1), tmp_path / "calls.jsonl")
    with pytest.raises(KeyboardInterrupt):
        chat.replies(talk, max_new_tokens=4, on_reply=stop_at_three)
    again = Kept(chat_at(server), tmp_path / "calls.jsonl")
    found = again.replies(talk, max_new_tokens=4)
    assert [one.text for one in found] == [f"T{i}" for i in range(30)]
    assert set(server.asked.values()) == {1}


def test_a_refusal_is_paid_and_kept(server, tmp_path):
    server.faults["a"] = ["refusal"] * 9
    for _ in range(2):
        (a,) = Kept(chat_at(server), tmp_path / "k.jsonl").replies([say("a")], max_new_tokens=4)
        assert a == Reply(None, "refused: I cannot help with that", 14, 6)
    assert server.asked["a"] == 2


def test_parts_go_through(server):
    parts = [{"type": "text", "text": "what is it"}, {"type": "image_url", "image_url": {}}]
    server.answer = lambda messages, body: "yes"
    (a,) = chat_at(server).replies([[{"role": "user", "content": parts}]], max_new_tokens=4)
    assert a.text == "yes"
    assert server.bodies[0]["messages"][0]["content"] == parts
