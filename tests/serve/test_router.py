"""The router against an optimiser of its own, and `auto` behind the server."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from openai import OpenAI
from serve.shelf import shelf_in

from deltaloom.core.base import Base
from deltaloom.core.errors import InputError
from deltaloom.serve import router
from deltaloom.serve._service import Service
from deltaloom.serve.server import Server
from deltaloom.serve.settings import Serving


def clouds(seed=0, sizes=(40, 15, 9), width=7):
    """Overlapping clouds of unequal size."""
    rng = np.random.default_rng(seed)
    parts = [rng.normal(rng.normal(size=width), 1.5, (n, width)) for n in sizes]
    labels = [f"t{k}" for k, n in enumerate(sizes) for _ in range(n)]
    x = np.concatenate(parts).astype(np.float32)
    x[:, 3] = 5.0  # a dimension that never varies
    return x, labels, [str(i) for i in range(len(labels))]


def test_weights_are_the_minimum():
    x, labels, ids = clouds()
    made = router.train(x, labels, ids, {})
    y = torch.tensor([made.tasks.index(one) for one in labels])
    scale = torch.tensor(x).double().std(0, correction=0)
    scale[scale < 1e-8] = 1
    z = (torch.tensor(x).double() - torch.tensor(x).double().mean(0)) / scale
    weight = torch.zeros(3, 7, dtype=torch.double, requires_grad=True)
    bias = torch.zeros(3, dtype=torch.double, requires_grad=True)
    n = len(y)
    balance = n / (3 * torch.bincount(y))
    newton = torch.optim.LBFGS(
        [weight, bias], max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe"
    )

    def loss():
        newton.zero_grad()
        nats = torch.nn.functional.cross_entropy(z @ weight.T + bias, y, reduction="none")
        total = (balance[y] * nats).sum() / n + weight.pow(2).sum() / (2 * n)
        total.backward()
        return total

    newton.step(loss)
    torch.testing.assert_close(
        torch.tensor(made.weight), weight.detach().float(), atol=2e-4, rtol=0
    )
    share = (z @ weight.T + bias).softmax(1).detach()
    found = made.route(x)
    assert [task for task, _ in found] == [made.tasks[k] for k in share.argmax(1)]
    np.testing.assert_allclose([p for _, p in found], share.max(1).values, atol=1e-4)


def test_accuracy_is_of_rows_held_out():
    """Labels without any truth are learned by heart and not predicted."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(60, 80)).astype(np.float32)
    labels = ["a", "b"] * 30
    made = router.train(x, labels, [str(i) for i in range(60)], {})
    assert [task for task, _ in made.route(x)] == labels
    assert made.about["low"] < 0.6
    assert made.about["rows"] == {"a": 30, "b": 30}


@pytest.mark.parametrize(
    ("labels", "words"), [(["a"] * 4, "at least two tasks"), (["a", "a", "a", "b"], "examples.b")]
)
def test_too_few(labels, words):
    with pytest.raises(InputError, match=words):
        router.train(np.zeros((4, 2), np.float32), labels, list("0123"), {})


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    folder = shelf_in(tmp_path_factory.mktemp("shelf"), ("lora", "prompt"))
    asked = {"lora": "who likes", "prompt": "where lives"}
    for task, words in asked.items():
        with open(folder / f"{task}.jsonl", "w") as file:
            for i, who in enumerate(["tom ben", "anna sue", "lily ben", "tom sue", "anna ben"]):
                prompt = f"{words} {who} ?"
                row = {"prompt": prompt, "completion": "oslo"}
                if i % 2:  # a conversation is routed by what its user says
                    row = {"messages": [
                        {"role": "user", "content": prompt},
                        {"role": "assistant", "content": "rome"},
                    ]}  # fmt: skip
                file.write(json.dumps(row) + "\n")
    return folder


def settings(shelf, **more):
    return Serving.parse(
        {
            "base": str(shelf / "base"),
            "deltas": [str(shelf / "lora"), str(shelf / "prompt")],
            "router": shelf / "router.safetensors",
            **more,
        },
        "serve",
    )


def test_auto(shelf, capfd):
    examples = {task: str(shelf / f"{task}.jsonl") for task in ("lora", "prompt")}
    with pytest.raises(InputError, match="no such router"):
        Service.open(settings(shelf))
    server = Server(settings(shelf, examples=examples, port=0))
    thread = threading.Thread(target=server.serve)
    thread.start()
    try:
        client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        assert [one.id for one in client.models.list()] == ["base", "lora", "prompt", "auto"]
        for words, task in (("who likes max ben ?", "lora"), ("where lives max sue ?", "prompt")):
            asked = {"prompt": words, "max_tokens": 9, "temperature": 0}
            routed = client.completions.create(model="auto", **asked)
            assert routed.model == task
            named = client.completions.create(model=task, **asked)
            assert routed.choices[0].text == named.choices[0].text
            turns = [{"role": "user", "content": words}]
            answer = client.chat.completions.create(model="auto", messages=turns, max_tokens=3)
            assert answer.model == task
        assert server.service.metrics.value("deltaloom_routed_total", model="lora") == 2
        asked = {"model": "auto", "max_tokens": 1}
        with ThreadPoolExecutor(8) as pool:
            many = ["who likes max ben ?", "where lives max sue ?"] * 8
            found = pool.map(lambda text: client.completions.create(prompt=text, **asked), many)
            assert [one.model for one in found] == ["lora", "prompt"] * 8
    finally:
        server.stop()
        thread.join(timeout=20)
    assert "go to their task" in capfd.readouterr().err
    # It is kept: no examples are needed, and the same ones train nothing.
    before = (shelf / "router.safetensors").read_bytes()
    for again in (settings(shelf), settings(shelf, examples=examples)):
        service = Service.open(again)
        service.worker.stop()
        assert service.router.tasks == ("lora", "prompt")
    assert (shelf / "router.safetensors").read_bytes() == before
    assert "go to their task" not in capfd.readouterr().err
    with pytest.raises(InputError, match="routes to 'prompt', which is not served"):
        Service.open(settings(shelf, deltas=[str(shelf / "lora")]))


def test_files_that_are_no_router(shelf, tmp_path):
    base = Base(model=str(shelf / "base"))
    (tmp_path / "r").write_bytes(b"nonsense")
    with pytest.raises(InputError, match="is no router"):
        router.Router.load(tmp_path / "r", base)
    x, labels, ids = clouds()
    router.train(x, labels, ids, {"base": "0123", "model": "another"}).save(tmp_path / "s")
    with pytest.raises(InputError, match=r"was trained on another \(0123\)"):
        router.Router.load(tmp_path / "s", base)
