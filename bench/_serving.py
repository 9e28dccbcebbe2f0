"""What the benches of serving share: the lab's base with tasks, a server process, its clients."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deltaloom.core.base import Base
from deltaloom.lab.files import write_lab

RANK, SPREAD = 8, 0.25
"""Of the tasks' adapters: random factors, so that tasks answer differently and at some length."""
PAGE = os.sysconf("SC_PAGE_SIZE")
TICK = os.sysconf("SC_CLK_TCK")


def tasks_in(folder: Path, count: int) -> dict[str, Path]:
    """The lab's base in `folder` and `count` adapters of all its linear layers; paths by name."""
    from peft import LoraConfig, get_peft_model

    base = Base(model=str(write_lab(folder / "lab", 0, "small")["base"]))
    linear = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    found = {"base": Path(base.model)}
    for seed in range(count):
        settings = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=linear, task_type="CAUSAL_LM")
        model = get_peft_model(base.load(), settings)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "lora_" in name:
                    weight.copy_(torch.randn(weight.shape, generator=generator) * SPREAD)
        found[f"task{seed}"] = folder / f"task{seed}"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.save_pretrained(found[f"task{seed}"])
    return found


def prompts_of(folder: Path, count: int) -> list[str]:
    """Questions of the lab's tests."""
    rows = (folder / "lab" / "test-birth.jsonl").read_text().splitlines()
    return [json.loads(row)["prompt"] for row in rows[:count]]


@dataclass
class Running:
    """A server process."""

    process: subprocess.Popen[str]
    port: int

    def cpu_seconds(self) -> float:
        """CPU time spent so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICK

    def resident(self) -> int:
        """Resident bytes that are this process's alone (private), shared libraries left out."""
        text = Path(f"/proc/{self.process.pid}/smaps_rollup").read_text()
        private = [line for line in text.splitlines() if line.startswith("Private_")]
        return sum(int(line.split()[1]) * 1024 for line in private)

    def get(self, path: str) -> str:
        """A page of the server."""
        call = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        call.request("GET", path, headers={"Authorization": "Bearer bench"})
        return call.getresponse().read().decode()


@contextmanager
def server(base: Path, deltas: dict[str, Path], *settings: str) -> Iterator[Running]:
    """`deltaloom serve` in a process of its own, one thread for the model."""
    words = [f"base={base}", *(f"deltas.{name}={path}" for name, path in deltas.items())]
    process = subprocess.Popen(
        [sys.executable, "-m", "deltaloom", "serve", *words, "port=0", *settings],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DELTALOOM_API_KEY": "bench"},
    )
    assert process.stderr is not None
    try:
        said = []
        for line in process.stderr:
            said.append(line)
            if line.startswith("serving"):
                threading.Thread(target=process.stderr.read, daemon=True).start()
                yield Running(process, int(line.rpartition(":")[2].split("/")[0]))
                break
        else:
            raise RuntimeError("".join(said))
    finally:
        process.terminate()
        process.wait(timeout=60)


class Client:
    """One connection, kept open."""

    def __init__(self, port: int) -> None:
        self.call = http.client.HTTPConnection("127.0.0.1", port, timeout=120)

    def complete(self, **body: Any) -> tuple[int, Any]:
        """Status and body of a completion."""
        return self.post("/v1/completions", json.dumps(body).encode())

    def post(self, path: str, body: bytes) -> tuple[int, Any]:
        """Status and body of any request."""
        headers = {"Content-Type": "application/json", "Authorization": "Bearer bench"}
        self.call.request("POST", path, body, headers)
        answer = self.call.getresponse()
        return answer.status, json.loads(answer.read())

    def stream(self, **body: Any) -> str:
        """The text of a streamed completion; raises ValueError where the stream breaks off."""
        headers = {"Content-Type": "application/json", "Authorization": "Bearer bench"}
        data = json.dumps({**body, "stream": True})
        self.call.request("POST", "/v1/completions", data, headers)
        lines = self.call.getresponse().read().decode().split("\n\n")
        events = [line.removeprefix("data: ") for line in lines if line]
        if events[-1] != "[DONE]":
            raise ValueError(f"broken off after {events[-1]}")
        return "".join(json.loads(one)["choices"][0]["text"] for one in events[:-1])
