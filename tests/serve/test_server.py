"""OpenAI's own client against the running server; garbage, absent clients, keys and the end."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import openai
import pytest
from serve.shelf import answers, shelf_in, texts

from deltaloom.core.errors import InputError
from deltaloom.serve.server import Server
from deltaloom.serve.settings import Serving

NAMES = ("lora", "prefix", "whole")
LONG = {"max_tokens": 100, "temperature": 0}


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    return shelf_in(tmp_path_factory.mktemp("shelf"), (*NAMES, "dora"))


@contextmanager
def running(shelf, **settings):
    deltas = {name: str(shelf / name) for name in NAMES}
    given = {"base": str(shelf / "base"), "deltas": deltas, "port": 0, **settings}
    server = Server(Serving.parse(given, "serve"))
    thread = threading.Thread(target=server.serve)
    thread.start()
    try:
        yield server
    finally:
        server.stop()
        thread.join(timeout=20)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def server(shelf):
    with running(shelf) as server:
        yield server


def client_of(server, key="none"):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)


@pytest.fixture(scope="module")
def client(server):
    return client_of(server)


def post(server, path, body, **headers):
    """Status, headers and body of a raw request."""
    call = http.client.HTTPConnection(*server.socket.getsockname()[:2], timeout=20)
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    call.request("POST", path, data, {"Content-Type": "application/json", **headers})
    answer = call.getresponse()
    return answer.status, answer.headers, answer.read()


def alone(shelf, name, prompts, new, stop=()):
    from deltaloom.core.base import Base

    ids = Base(model=str(shelf / "base")).tokenizer()(prompts)["input_ids"]
    return answers(shelf, name, ids, new, stop)


def refuses(client):
    """Wait until nobody listens."""
    for _ in range(500):
        try:
            client.models.list()
        except openai.APIConnectionError:
            return True
        time.sleep(0.02)
    return False


def idle(server):
    """Wait until nothing is under way."""
    for _ in range(400):
        if not server.service.worker.active and not server.service.worker.waiting:
            return True
        time.sleep(0.01)
    return False


def test_models(client):
    assert [one.id for one in client.models.list()] == ["base", *NAMES]
    assert client.models.retrieve("lora").id == "lora"
    with pytest.raises(openai.NotFoundError, match="did you mean 'lora'"):
        client.models.retrieve("loar")


def test_concurrent_completions_are_what_each_task_says_alone(client, shelf):
    asked = [(name, text) for text in texts(6) for name in ("base", *NAMES)]

    def ask(pair):
        name, text = pair
        return client.completions.create(model=name, prompt=text, max_tokens=12, temperature=0)

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(ask, asked))
    wanted = {name: alone(shelf, name, texts(6), 12) for name in ("base", *NAMES)}
    for (name, text), answer in zip(asked, found, strict=True):
        one = wanted[name][texts(6).index(text)]
        assert answer.choices[0].text == one.text
        assert answer.model == name
        assert answer.usage.prompt_tokens == one.prompt_tokens
        assert answer.usage.completion_tokens == one.new_tokens
        assert answer.choices[0].finish_reason == ("stop" if one.finished else "length")


def test_streams_say_the_same(client):
    for name in ("base", *NAMES):
        asked = {"model": name, "prompt": texts(3), "max_tokens": 12, "temperature": 0}
        whole = client.completions.create(**asked)
        options = {"include_usage": True}
        chunks = list(client.completions.create(**asked, stream=True, stream_options=options))
        said = ["", "", ""]
        ends = [None, None, None]
        for chunk in chunks[:-1]:
            (choice,) = chunk.choices
            said[choice.index] += choice.text
            ends[choice.index] = choice.finish_reason or ends[choice.index]
        assert said == [choice.text for choice in whole.choices]
        assert ends == [choice.finish_reason for choice in whole.choices]
        assert chunks[-1].usage == whole.usage
        assert len({chunk.id for chunk in chunks}) == 1


def test_chat(client, shelf):
    turns = [
        {"role": "system", "content": [{"type": "text", "text": "anna"}]},
        {"role": "user", "content": "where lives tom ?"},
    ]
    asked = {"model": "lora", "messages": turns, "max_completion_tokens": 9, "temperature": 0}
    answer = client.chat.completions.create(**asked)
    # The tiny template: <s> before each turn that is not the assistant's.
    (wanted,) = alone(shelf, "lora", ["<s> anna <s> where lives tom ?"], 9)
    assert answer.choices[0].message.content == wanted.text
    assert answer.choices[0].message.role == "assistant"
    chunks = list(client.chat.completions.create(**asked, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(one.choices[0].delta.content or "" for one in chunks) == wanted.text
    assert chunks[-1].choices[0].finish_reason == answer.choices[0].finish_reason


def test_several_answers_and_seeds(client):
    asked = {"model": "base", "prompt": "tom", "max_tokens": 10, "temperature": 1.5}
    several = client.completions.create(**asked, n=4, seed=3)
    again = client.completions.create(**asked, n=4, seed=3)
    told = [one.text for one in several.choices]
    assert [one.index for one in several.choices] == [0, 1, 2, 3]
    assert told == [one.text for one in again.choices]
    assert len({*told}) > 1
    assert client.completions.create(**asked, seed=3).choices[0].text == told[0]


def test_stop_and_token_ids(client, shelf):
    (whole,) = alone(shelf, "base", ["tom lives"], 12)
    word = whole.text.split()[3]
    (wanted,) = alone(shelf, "base", ["tom lives"], 12, [word])
    ids = [4 + ["who", "where", "lives", "likes", "tom"].index(w) for w in ("tom", "lives")]
    for prompt in ("tom lives", ids, [ids]):
        answer = client.completions.create(
            model="base", prompt=prompt, max_tokens=12, temperature=0, stop=word
        )
        assert answer.choices[0].text == wanted.text
        assert answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"model": "loar"}, openai.NotFoundError, "did you mean 'lora'.*base, lora, prefix"),
        ({"model": "auto"}, openai.NotFoundError, "no model 'auto'"),
        ({"prompt": "tom " * 200}, openai.BadRequestError, "takes 128 tokens, and 200"),
        ({"max_tokens": 128}, openai.BadRequestError, "takes 128 tokens"),
        ({"max_tokens": 0}, openai.BadRequestError, "max_tokens"),
        ({"temperature": -1}, openai.BadRequestError, "temperature"),
        ({"logprobs": 0}, openai.BadRequestError, "logprobs is not supported"),
        ({"logprobs": 2}, openai.BadRequestError, "logprobs is not supported"),
        ({"frequency_penalty": 1}, openai.BadRequestError, "frequency_penalty is not supported"),
        ({"extra_body": {"top_k": 3}}, openai.BadRequestError, "unknown key 'top_k'"),
        ({"prompt": []}, openai.BadRequestError, "empty list"),
        ({"prompt": [23]}, openai.BadRequestError, "from 0 to 22"),
        ({"prompt": ["a"] * 9, "n": 9}, openai.BadRequestError, "more than 64"),
    ],
)
def test_requests_that_are_refused(client, change, error, words):
    asked = {"model": "base", "prompt": "tom", "max_tokens": 3, **change}
    with pytest.raises(error, match=words) as caught:
        client.completions.create(**asked)
    assert caught.value.body["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"model": NaN}',
        b"[" * 100_000,
        b'{"model": 1}',
    ],
)
def test_garbage(server, body):
    for path in ("/v1/completions", "/v1/chat/completions"):
        status, _, told = post(server, path, body)
        assert status == 400
        assert json.loads(told)["error"]["type"] == "invalid_request_error"


def test_half_a_surrogate_pair(server):
    for body in (rb'{"model": "base", "prompt": "\uD800"}', rb'{"model": "\ud800", "prompt": "a"}'):
        status, _, told = post(server, "/v1/completions", body)
        assert (status, b"surrogate" in told) == (400, True)


def test_paths_methods_and_no_http(server, capfd):
    assert post(server, "/v1/embeddings", {})[0] == 404
    assert post(server, "/health", {})[0] == 405
    with socket.create_connection(server.socket.getsockname()[:2]) as raw:
        raw.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        assert b"400" in raw.recv(1000)
    # Who sends garbage writes no logs: a pipe that nobody reads would stop the server.
    assert capfd.readouterr().err == ""


def test_a_body_has_a_size(shelf):
    with running(shelf, body_bytes=1024) as server:
        assert post(server, "/v1/completions", {"model": "base", "prompt": "a " * 2000})[0] == 413
        assert client_of(server).completions.create(model="base", prompt="tom").choices


def test_clients_that_go_away_cost_nothing(server, client):
    gone = server.service.metrics.value("deltaloom_cancelled_total")
    cancelled = 0
    for stream in (False, True):
        body = json.dumps({"model": "base", "prompt": "tom", "stream": stream, "n": 3, **LONG})
        held = threading.Event()
        server.service.worker.call(lambda held=held: held.wait(5))
        call = http.client.HTTPConnection(*server.socket.getsockname()[:2])
        call.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        while server.service.worker.waiting < 3:
            time.sleep(0.005)
        call.sock.shutdown(socket.SHUT_RDWR)
        call.close()
        time.sleep(0.1)
        held.set()
        cancelled += 3
        assert idle(server)
        assert server.service.metrics.value("deltaloom_cancelled_total") == gone + cancelled
    assert client.completions.create(model="lora", prompt="tom").choices


def test_a_full_queue_says_when_to_come_back(shelf):
    with running(shelf, queue=2) as server:
        held = threading.Event()
        server.service.worker.call(lambda: held.wait(10))
        client = client_of(server)
        with ThreadPoolExecutor(2) as pool:
            asked = [
                pool.submit(client.completions.create, model="base", prompt="tom", max_tokens=4)
                for _ in range(2)
            ]
            while server.service.worker.waiting < 2:
                time.sleep(0.005)
            status, headers, body = post(
                server, "/v1/completions", {"model": "base", "prompt": "tom"}
            )
            with pytest.raises(openai.RateLimitError):
                client.completions.create(model="base", prompt="tom")
            held.set()
            assert all(one.result().choices for one in asked)
        assert (status, headers["Retry-After"]) == (429, "1")
        assert json.loads(body)["error"]["code"] == "overloaded"


def test_keys(shelf, monkeypatch):
    monkeypatch.setenv("DELTALOOM_API_KEY", "user key")
    monkeypatch.setenv("DELTALOOM_ADMIN_KEY", "admin key")
    new = {"name": "fresh", "path": str(shelf / "dora")}
    with running(shelf) as server:
        with pytest.raises(openai.AuthenticationError):
            client_of(server, "another").models.list()
        assert post(server, "/v1/completions", {})[0] == 401
        assert urllib.request.urlopen(f"{server.url}/health").status == 200
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"{server.url}/metrics")
        client = client_of(server, "user key")
        assert client.completions.create(model="base", prompt="tom").choices
        assert post(server, "/v1/adapters", new, Authorization="Bearer user key")[0] == 401
        assert post(server, "/v1/adapters", new, Authorization="Bearer admin key")[0] == 201
        assert client.completions.create(model="fresh", prompt="tom").choices


def test_tasks_come_and_go(shelf, monkeypatch):
    monkeypatch.setenv("DELTALOOM_API_KEY", "key")
    with running(shelf) as server:
        client = client_of(server, "key")
        add = {"name": "fresh", "path": str(shelf / "dora")}
        own = {"Authorization": "Bearer key"}
        status, _, body = post(server, "/v1/adapters", add, **own)
        assert (status, json.loads(body)["kind"]) == (201, "lowrank")
        assert post(server, "/v1/adapters", add, **own)[0] == 409
        assert post(server, "/v1/adapters", {"name": "x"}, **own)[0] == 400
        broken = {"name": "x", "path": str(shelf / "nowhere")}
        status, _, body = post(server, "/v1/adapters", broken, **own)
        assert status == 400
        assert "no such folder" in json.loads(body)["error"]["message"]
        wanted = alone(shelf, "dora", texts(1), 12)[0].text
        asked = {"model": "fresh", "prompt": texts(1)[0], "max_tokens": 12, "temperature": 0}
        assert client.completions.create(**asked).choices[0].text == wanted
        client.delete("/adapters/fresh", cast_to=object)
        with pytest.raises(openai.NotFoundError):
            client.completions.create(**asked)
        with pytest.raises(openai.BadRequestError, match="it stays"):
            client.delete("/adapters/base", cast_to=object)


def test_without_a_key_nobody_changes_tasks(server, shelf):
    add = {"name": "fresh", "path": str(shelf / "dora")}
    assert post(server, "/v1/adapters", add)[0] == 403


def test_metrics(server, client):
    client.completions.create(model="lora", prompt="tom lives", max_tokens=2, temperature=0)
    assert idle(server)
    text = urllib.request.urlopen(f"{server.url}/metrics").read().decode()
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
    assert float(values['deltaloom_prompt_tokens_total{model="lora"}']) >= 2
    assert float(values["deltaloom_active"]) == 0
    told = 'deltaloom_requests_total{model="lora",path="/v1/completions",status="200"}'
    assert float(values[told]) >= 1
    many = 'deltaloom_request_seconds_bucket{path="/v1/completions",le="+Inf"}'
    assert values[many] == values['deltaloom_request_seconds_count{path="/v1/completions"}']
    # Names that clients made up are in no label.
    assert "loar" not in text


def test_a_port_in_use(server, shelf):
    port = server.socket.getsockname()[1]
    with pytest.raises(InputError, match=f"cannot listen on 127.0.0.1:{port}"):
        Server(Serving.parse({"base": str(shelf / "base"), "port": port}, "serve"))


def test_a_drain_has_an_end(shelf):
    with running(shelf, drain_seconds=0.1) as server:
        client = client_of(server)
        stream = client.completions.create(model="base", prompt="tom", stream=True, n=64, **LONG)
        next(iter(stream))
        begun = time.monotonic()
    # Nobody reads, and the server has ended all the same.
    assert time.monotonic() - begun < 10
    assert not server.service.worker.alive
    stream.close()


def test_a_signal_drains(shelf):
    """The real command: SIGTERM lets the stream under way finish, then the exit code is 0."""
    process = subprocess.Popen(
        [sys.executable, "-m", "deltaloom", "serve", f"base={shelf / 'base'}", "port=0"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        lines = iter(process.stderr.readline, "")
        url = next(line for line in lines if line.startswith("serving")).split()[-1]
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
        # Nobody reads, so the answer cannot be done before the signal.
        stream = iter(
            client.completions.create(model="base", prompt="tom", stream=True, n=64, **LONG)
        )
        first = next(stream)
        process.send_signal(signal.SIGTERM)
        assert refuses(client)
        rest = [first, *stream]
        assert sum(one.choices[0].finish_reason is not None for one in rest) == 64
        assert process.wait(timeout=20) == 0
        assert "stopped" in process.stderr.read()
    finally:
        process.kill()
        process.wait()
