"""Requests per second of `deltaloom serve` with 8 clients, against one-at-a-time `generate`.

The lab's base with adapters of rank 8 on all linear layers, random so that answers are long. The
peer is transformers' `generate` of a PeftModel that holds all adapters, asked for one request after
the other, adapter by adapter: no HTTP, no switching in between. Both give the same texts, which is
checked. Rounds alternate; the figure is the median of their ratios. The second table is one server
of many tasks against a server for each: memory of the processes, weights, requests per second.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from _serving import Client, prompts_of, server, tasks_in

from deltaloom.core.base import Base

CLIENTS, NEW, SHORT, BOUND = 8, 32, 2, 3.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one short round, two tasks")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tasks", type=int, default=4)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rounds, count, each = (1, 2, 8) if options.quick else (options.rounds, options.tasks, 24)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        places = tasks_in(folder, count)
        results = throughput(folder, places, rounds, each)
        results += overhead(folder, places, rounds, each)
    if options.quick:  # one round of 16 requests shows that it runs, and nothing else
        results = [{**own, "bound": None, "holds": True} for own in results]
    print(json.dumps({"bench": "serve", "results": results}))


def throughput(folder: Path, places: dict[str, Path], rounds: int, each: int) -> list[dict]:
    """Served against generated, and how the texts agree."""
    deltas = {name: path for name, path in places.items() if name != "base"}
    asked = [(name, text) for text in prompts_of(folder, each) for name in deltas]
    peer = Peer(places["base"], deltas)
    seen: dict[int, list[tuple[float, ...]]] = {NEW: [], SHORT: []}
    equal = True
    print(f"{len(asked)} requests a round over {len(deltas)} tasks, {CLIENTS} clients.\n")
    print(
        "| answers | tokens, mean | generate, requests/s | served | ratio | ratio of CPU seconds |"
    )
    print("|---|---|---|---|---|---|")
    with server(places["base"], deltas) as running:
        ask_all(running.port, asked[: 2 * CLIENTS], NEW)
        for new in (NEW, SHORT) * rounds:
            begun, spent = time.perf_counter(), time.process_time()
            wanted, tokens = peer.answers(asked, new)
            alone, alone_cpu = time.perf_counter() - begun, time.process_time() - spent
            begun, spent = time.perf_counter(), running.cpu_seconds()
            found = ask_all(running.port, asked, new)
            served, served_cpu = time.perf_counter() - begun, running.cpu_seconds() - spent
            equal &= found == wanted
            seen[new].append((alone / served, alone_cpu / served_cpu))
            print(
                f"| at most {new} tokens | {tokens / len(asked):.1f} | {len(asked) / alone:.1f} | "
                f"{len(asked) / served:.1f} | {alone / served:.2f} | {alone_cpu / served_cpu:.2f} |"
            )
    long, short = (
        [statistics.median(column) for column in zip(*seen[new], strict=True)]
        for new in (NEW, SHORT)
    )
    unit = f"ratio, median of {rounds} rounds"
    return [
        one("requests per second, served / generate", long[0], f">= {BOUND:.0f}", long[0] >= BOUND,
            unit),
        one(f"the same, answers of {SHORT} tokens", short[0], None, True, unit),
        one("CPU seconds, generate / server", long[1], None, True, unit),
        one("served texts equal to generated ones", float(equal), "1", equal, "yes is 1"),
    ]  # fmt: skip


def overhead(folder: Path, places: dict[str, Path], rounds: int, each: int) -> list[dict]:
    """One server of all tasks against a server for each, each with a whole model."""
    deltas = {name: path for name, path in places.items() if name != "base"}
    wholes = {name: whole_model(places["base"], path) for name, path in deltas.items()}
    asked = [(name, text) for text in prompts_of(folder, each) for name in deltas]
    count = len(deltas)
    set_ups = {
        # As a merged or jointly tuned model would: any model with answers as long as the others'.
        "one server, one model for all tasks": [(wholes["task0"], {})],
        "one server, adapters of one base": [(places["base"], deltas)],
        "one server, whole models": [(places["base"], wholes)],
        "a server for each task, whole models": [(path, {}) for path in wholes.values()],
    }
    if rounds == 1:
        del set_ups["one server, whole models"]
    with ExitStack() as stack:
        running = {
            title: [stack.enter_context(server(base, own, "name=served")) for base, own in starts]
            for title, starts in set_ups.items()
        }
        rows: dict[str, list[list[float]]] = {title: [] for title in set_ups}
        for _ in range(rounds + 1):  # the first warms up
            for title, servers in running.items():
                own = set_ups[title][0][1]
                ports = dict(zip(deltas, (servers * count)[:count], strict=True))
                routed = [(ports[n].port, n if own else "served", text) for n, text in asked]
                begun, spent = time.perf_counter(), sum(one.cpu_seconds() for one in servers)
                ask(routed, NEW)
                seconds = time.perf_counter() - begun
                spent = sum(one.cpu_seconds() for one in servers) - spent
                rows[title].append([len(asked) / seconds, spent / len(asked) * 1000])
        held = {
            title: (sum(one.resident() for one in servers), sum(weights(one) for one in servers))
            for title, servers in running.items()
        }
    print(f"\n{count} tasks, answers of at most {NEW} tokens, medians of {rounds} rounds:\n")
    print("| set-up | private memory, MiB | weights, MiB | requests/s | CPU ms a request |")
    print("|---|---|---|---|---|")
    median = {
        title: [statistics.median(column) for column in zip(*found[1:], strict=True)]
        for title, found in rows.items()
    }
    for title, (private, weight) in held.items():
        rate, spent = median[title]
        print(
            f"| {title} | {private / 2**20:.0f} | {weight / 2**20:.2f} | {rate:.1f} | {spent:.1f} |"
        )
    print()
    joint, adapters, *_, many = set_ups
    against = f"one server of {count} tasks / {count} servers"
    unit = f"ratio, medians of {rounds} rounds"
    return [
        one(f"private memory, {against}", held[adapters][0] / held[many][0], None, True, "ratio"),
        one(f"weights, {against}", held[adapters][1] / held[many][1], None, True, "ratio"),
        one(f"requests per second, {against}", median[adapters][0] / median[many][0], None, True,
            unit),
        one(f"CPU seconds a request, {against}", median[adapters][1] / median[many][1], None, True,
            unit),
        one(f"weights, one model for all / {count} servers", held[joint][1] / held[many][1], None,
            True, "ratio"),
    ]  # fmt: skip


def whole_model(base: Path, adapter: Path) -> Path:
    """The adapter merged into a model folder beside it."""
    from peft import PeftModel

    out = adapter.with_name(f"{adapter.name}-whole")
    own = Base(model=str(base))
    PeftModel.from_pretrained(own.load(), adapter).merge_and_unload().save_pretrained(out)
    own.tokenizer().save_pretrained(out)
    return out


def weights(running: Any) -> float:
    """Bytes of weights that a server holds."""
    lines = running.get("/metrics").splitlines()
    return next(float(x.split()[1]) for x in lines if x.startswith("deltaloom_weight_bytes "))


def ask_all(port: int, asked: list[tuple[str, str]], new: int) -> dict[tuple[str, str], str]:
    """All requests to one server."""
    texts = ask([(port, name, text) for name, text in asked], new)
    return dict(zip(asked, texts, strict=True))


def ask(routed: list[tuple[int, str, str]], new: int) -> list[str]:
    """Each (port, model, prompt) once, by 8 clients side by side; the texts."""
    found: list[str] = [""] * len(routed)
    left = iter(enumerate(routed))

    def client(_: int) -> None:
        kept: dict[int, Client] = {}
        for i, (port, name, text) in left:
            own = kept.setdefault(port, Client(port))
            status, body = own.complete(model=name, prompt=text, max_tokens=new, temperature=0)
            assert status == 200, body
            found[i] = body["choices"][0]["text"]

    with ThreadPoolExecutor(CLIENTS) as pool:
        list(pool.map(client, range(CLIENTS)))
    return found


class Peer:
    """transformers' `generate`, one request at a time."""

    def __init__(self, base: Path, deltas: dict[str, Path]) -> None:
        from peft import PeftModel

        own = Base(model=str(base))
        first, *rest = deltas
        self.tokenizer = own.tokenizer()
        self.model: Any = PeftModel.from_pretrained(own.load(), deltas[first], adapter_name=first)
        for name in rest:
            self.model.load_adapter(deltas[name], adapter_name=name)
        self.model.eval()

    def answers(
        self, asked: list[tuple[str, str]], new: int
    ) -> tuple[dict[tuple[str, str], str], int]:
        """Each request's text, and all tokens; by task, so that adapters are switched once."""
        found, tokens, active = {}, 0, None
        for name, text in sorted(asked):
            if name != active:
                self.model.set_adapter(name)
                active = name
            ids = self.tokenizer(text, return_tensors="pt")["input_ids"]
            with torch.inference_mode():
                made = self.model.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new,
                    do_sample=False, pad_token_id=self.tokenizer.pad_token_id,
                )[0, ids.shape[1] :]  # fmt: skip
            tokens += len(made)
            found[name, text] = self.tokenizer.decode(
                made, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        return found, tokens


def one(name: str, value: float, bound: str | None, holds: bool, unit: str) -> dict:
    """A result."""
    return {"name": name, "value": value, "bound": bound, "holds": holds, "unit": unit}


if __name__ == "__main__":
    main()
