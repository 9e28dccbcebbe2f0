"""Five minutes of `deltaloom serve` on loopback among clients that behave and clients that do not.

Six honest clients, half of them streaming, ask tasks of four kinds (base, adapters, a prefix, a
whole model) and compare every answer with what the task's own model says alone; meanwhile one
client goes away at random moments, one sends garbage, one asks for tasks that do not exist, and one
adds and removes a task that it also asks. A request is lost when it has no answer with status 200,
crossed when it has another text than its own.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import socket
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _serving import Client, Running, prompts_of, server, tasks_in

from deltaloom.core.base import Base
from deltaloom.core.delta import load
from deltaloom.engine.generate import generate_greedily

HONEST, NEW, PROMPTS = 6, 24, 40
GARBAGE = (
    b"", b"{", b"[]", b"null", b"\x00\xff\xfe", b'{"model": 3}', b'{"model": "base"}',
    b'{"model": "base", "prompt": {}}', b'{"model": "base", "prompt": [99999999]}',
    b'{"model": "base", "prompt": "a", "max_tokens": 1e99}',
    b'{"model": "base", "prompt": "a", "temperature": NaN}',
    b'{"model": "base", "prompt": "\\ud800"}', b"[" * 50_000, b'{"a":' * 20_000,
    b'{"model": "base", "prompt": "' + b"a " * 3000 + b'"}',
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="ten seconds")
    parser.add_argument("--seconds", type=float, default=300.0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    seconds = 10.0 if options.quick else options.seconds
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        places = shelf(folder)
        wanted = alone(folder, places)
        deltas = {name: path for name, path in places.items() if name not in ("base", "task2")}
        with server(places["base"], deltas, "batch=16", "queue=64") as running:
            told = Load(running, wanted, places["task2"]).run(seconds)
            report(told, running, seconds)


def shelf(folder: Path) -> dict[str, Path]:
    """The base, three adapters, a prefix and a whole model."""
    from peft import PeftModel, PrefixTuningConfig, get_peft_model

    places = tasks_in(folder, 3)
    base = Base(model=str(places["base"]))
    places["prefix"] = folder / "prefix"
    prefixed = get_peft_model(
        base.load(), PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM")
    )
    generator = torch.Generator().manual_seed(9)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        for weight in prefixed.parameters():
            if weight.requires_grad:
                weight.copy_(torch.randn(weight.shape, generator=generator))
        prefixed.save_pretrained(places["prefix"])
    whole = PeftModel.from_pretrained(base.load(), places["task1"]).merge_and_unload()
    with torch.no_grad():
        for weight in whole.parameters():
            weight += torch.randn(weight.shape, generator=generator) * 0.02
    places["whole"] = folder / "whole"
    whole.save_pretrained(places["whole"])
    base.tokenizer().save_pretrained(places["whole"])
    return places


def alone(folder: Path, places: dict[str, Path]) -> dict[str, dict[str, str]]:
    """Task -> prompt -> what its own model says, one request at a time."""
    base = Base(model=str(places["base"]))
    tokenizer = base.tokenizer()
    prompts = prompts_of(folder, PROMPTS)
    found = {}
    for name, path in places.items():
        if name in ("base", "whole"):
            model: Any = Base(model=str(path)).load()
        else:
            model = load(path, base).apply(base)
        ids = [tokenizer(text)["input_ids"] for text in prompts]
        said = [generate_greedily(model, tokenizer, [one], NEW)[0].text for one in ids]
        found[name] = dict(zip(prompts, said, strict=True))
    return found


class Load:
    """All clients, until the time is up."""

    def __init__(self, running: Running, wanted: dict[str, dict[str, str]], extra: Path) -> None:
        self.running, self.wanted, self.extra = running, wanted, extra
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.memory: list[float] = []
        self._lock = threading.Lock()
        self._until = 0.0

    def run(self, seconds: float) -> Load:
        """Start everyone and wait."""
        self._until = time.monotonic() + seconds
        work = [
            *(lambda k=k: self._honest(k) for k in range(HONEST)),
            self._leaver, self._vandal, self._stranger, self._admin,
        ]  # fmt: skip
        threads = [threading.Thread(target=self._safely, args=(one,)) for one in work]
        for thread in threads:
            thread.start()
        while time.monotonic() < self._until:
            self.memory.append(self.running.resident() / 2**20)
            time.sleep(2)
        for thread in threads:
            thread.join()
        return self

    def _safely(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            self._note("clients that broke off", f"{type(error).__name__}: {error}")

    @property
    def _on(self) -> bool:
        return time.monotonic() < self._until

    def _note(self, what: str, wrong: str | None = None) -> None:
        with self._lock:
            self.counts[what] += 1
            if wrong is not None:
                self.wrong.append(f"{what}: {wrong}")

    def _honest(self, number: int) -> None:
        rng, client = random.Random(number), Client(self.running.port)
        names = [name for name in self.wanted if name != "task2"]
        while self._on:
            self._ask(client, rng, rng.choice(names), number % 2 == 0)

    def _ask(self, client: Client, rng: random.Random, name: str, stream: bool) -> None:
        prompt = rng.choice([*self.wanted[name]])
        body = {"model": name, "prompt": prompt, "max_tokens": NEW, "temperature": 0}
        self._note("honest requests")
        try:
            if stream:
                text = client.stream(**body)
            else:
                status, told = client.complete(**body)
                text = told["choices"][0]["text"] if status == 200 else None
        except (OSError, ValueError, http.client.HTTPException) as error:
            self._note("lost", f"{type(error).__name__}: {error}")
            client.call.close()
            return
        if text is None:
            self._note("lost", f"{status} {told}")
        elif text != self.wanted[name][prompt]:
            others = [one for one, said in self.wanted.items() if said[prompt] == text]
            self._note("crossed", f"{name} {prompt!r}: {text!r}, as of {others}")
        else:
            self._note("answered right")

    def _leaver(self) -> None:
        """Ask for long answers and go before they are there."""
        rng = random.Random(100)
        while self._on:
            body = {
                "model": rng.choice(["base", "task0", "whole"]),
                "prompt": "kindly",
                "max_tokens": 200,
                "temperature": 1.0,
                "n": rng.randint(1, 4),
                "stream": rng.random() < 0.5,
            }
            data = json.dumps(body).encode()
            head = (
                "POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer bench\r\n"
                f"Content-Length: {len(data)}\r\n\r\n"
            ).encode()
            with socket.create_connection(("127.0.0.1", self.running.port)) as raw:
                # Some leave before their request is whole.
                raw.sendall((head + data)[: len(head) + rng.choice([len(data), len(data), 20])])
                time.sleep(rng.random() * 0.15)
            self._note("clients that went away")

    def _vandal(self) -> None:
        rng = random.Random(200)
        while self._on:
            body = rng.choice([*GARBAGE, rng.randbytes(rng.randint(1, 200))])
            path = rng.choice(["/v1/completions", "/v1/chat/completions"])
            client = Client(self.running.port)
            status, told = client.post(path, body)
            client.call.close()
            good = 400 <= status < 500 and "message" in told["error"]
            self._note("garbage refused" if good else "garbage taken", None if good else str(told))
            with socket.create_connection(("127.0.0.1", self.running.port)) as raw:
                raw.settimeout(10)
                raw.sendall(rng.randbytes(30) + b"\r\n\r\n")
                raw.recv(200)
            time.sleep(0.02)

    def _stranger(self) -> None:
        rng, client = random.Random(300), Client(self.running.port)
        while self._on:
            name = rng.choice(["task9", "", "base ", "auto", "../base", "é" * 50])
            status, told = client.complete(model=name, prompt="kindly", max_tokens=2)
            good = status == 404 and "task0" in told["error"]["message"]
            self._note("unknown tasks refused" if good else "unknown tasks taken",
                       None if good else str(told))  # fmt: skip
            time.sleep(0.01)

    def _admin(self) -> None:
        """Add a task, ask it, remove it, see that it is gone."""
        rng, client = random.Random(400), Client(self.running.port)
        path = json.dumps({"name": "task2", "path": str(self.extra)}).encode()
        while self._on:
            status, told = client.post("/v1/adapters", path)
            self._note("tasks added" if status == 201 else "lost",
                       None if status == 201 else f"adding: {status} {told}")  # fmt: skip
            for k in range(5):
                self._ask(client, rng, "task2", k % 2 == 0)
            client.call.request(
                "DELETE", "/v1/adapters/task2", headers={"Authorization": "Bearer bench"}
            )
            client.call.getresponse().read()
            status, _ = client.complete(model="task2", prompt="kindly", max_tokens=2)
            if status != 404:
                self._note("lost", f"removed and still there: {status}")
            time.sleep(0.3)


def report(told: Load, running: Running, seconds: float) -> None:
    """The table, what went wrong, and the results."""
    time.sleep(1.0)
    values = dict(
        line.rsplit(" ", 1) for line in running.get("/metrics").splitlines() if line[0] != "#"
    )
    counts = told.counts
    print("| what | count |\n|---|---|")
    for what, count in sorted(counts.items()):
        print(f"| {what} | {count} |")
    part = max(1, len(told.memory) // 5)
    early, late = told.memory[part : 2 * part], told.memory[-part:]
    first, last = sum(early) / len(early), sum(late) / len(late)
    answers = [{said[prompt] for said in told.wanted.values()} for prompt in told.wanted["base"]]
    different = sum(len(one) for one in answers) / (len(answers) * len(told.wanted))
    print(
        f"\nPrivate memory of the server: {first:.1f} MiB in the second fifth of the time, "
        f"{last:.1f} MiB in the last. Honest answers per second: "
        f"{counts['answered right'] / seconds:.1f}. Of {len(told.wanted)} tasks' answers to a "
        f"prompt, {different:.2f} are different ones.\n"
    )
    for line in told.wrong[:20]:
        print("-", line)
    left = float(values["deltaloom_active"]) + float(values["deltaloom_waiting"])
    failed = float(values.get("deltaloom_step_failures_total", 0))
    taken = counts["garbage taken"] + counts["unknown tasks taken"]
    alive = running.process.poll() is None and "ok" in running.get("/health")
    results = [
        one("honest requests", counts["honest requests"], None, True, "requests"),
        one("lost", counts["lost"] + counts["clients that broke off"], "0", None, "requests"),
        one("crossed", counts["crossed"], "0", None, "requests"),
        one("garbage or unknown tasks answered", taken, "0", None, "requests"),
        one("left over when all clients are done", left, "0", None, "requests"),
        one("steps that failed", failed, "0", None, "steps"),
        one("server alive", float(alive), "1", alive, "yes is 1"),
        one("growth of memory, second to last fifth", last - first, None, True, "MiB"),
    ]
    print(json.dumps({"bench": "serve_load", "results": results}))


def one(name: str, value: float, bound: str | None, holds: bool | None, unit: str) -> dict:
    """A result; None holds when the value is 0."""
    held = value == 0 if holds is None else holds
    return {"name": name, "value": value, "bound": bound, "holds": held, "unit": unit}


if __name__ == "__main__":
    main()
