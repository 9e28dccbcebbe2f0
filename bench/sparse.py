"""Sparse tuning beside LoRA of equal parameters and PEFT's SHiRA: time of a step, saved tensors.

    python bench/sparse.py [--quick] [--repeats N]

CPU seconds of one thread, medians, the methods taking turns in this process on the same model and
batch. A step is forward, backward and optimizer of a random Llama whose linear modules but the
head are adapted; density is 1 %, LoRA and SHiRA have the rank nearest to that many parameters.
SpIEL's step is counted plainly and over one period of 20 steps with what a selection costs: 5 steps
that look at gradients, the first of which ranks all of them, and the exchange. Saved tensors are
the bytes that autograd holds between forward and backward, each storage once, parameters and
buffers of the model not counted: of eight adapted linear layers in a row, and of the whole model.
The gradients are compared with dense ones taken at the same places.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import nn

DENSITY, PERIOD, LOOKS = 0.01, 20, 5
STEP, SAVED = 1.3, 0.5


def llama(hidden: int, layers: int) -> nn.Module:
    """A random Llama of the usual proportions and a small vocabulary."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
    )
    return LlamaForCausalLM(config)


class Stack(nn.Module):
    """Linear layers in a row, as a model that PEFT takes."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def adapted(model: nn.Module, kind: str) -> Any:
    """`model` in PEFT, with the parameters of the LoRA that is nearest to 1 % of the weights."""
    from peft import LoraConfig, ShiraConfig, get_peft_model

    from deltaloom.core.adapters.sparse import SparseConfig

    names = "all-linear" if hasattr(model, "lm_head") else [f"layers.{i}" for i in range(8)]
    linear = [
        m.weight for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"
    ]
    weights = sum(weight.numel() for weight in linear)
    sides = sum(sum(weight.shape) for weight in linear)
    rank = round(DENSITY * weights / sides)
    config = {
        "LoRA": LoraConfig(r=rank, target_modules=names),
        "SHiRA": ShiraConfig(r=rank, target_modules=names, random_seed=0),
        "sparse": SparseConfig(density=rank * sides / weights, target_modules=names),
    }[kind]
    return get_peft_model(model, config)


def saved_bytes(model: nn.Module, forward: Callable[[], Any]) -> int:
    """Bytes that autograd keeps of one forward pass."""
    owned = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    found: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storages = [tensor._values(), tensor._indices()] if tensor.is_sparse else [tensor]
        for one in storages:
            storage = one.untyped_storage()
            if storage.data_ptr() not in owned:
                found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = forward()  # alive, or its memory would be counted for another tensor
    del kept
    return sum(found.values())


def seconds(do: Callable[[], Any]) -> float:
    start = time.process_time()
    do()
    return time.process_time() - start


def row(name: str, value: float, bound: float | None, unit: str) -> dict[str, Any]:
    """One result; it holds when it is at most `bound`."""
    holds = bound is None or value <= bound
    return {
        "name": name,
        "value": float(f"{value:.4g}"),
        "bound": bound,
        "holds": holds,
        "unit": unit,
    }


def saved(width: int, tokens: int) -> list[dict]:
    """What eight adapted layers keep for backward."""
    found = {}
    for kind in ("LoRA", "SHiRA", "sparse"):
        model = adapted(Stack(width, 8), kind)
        x = torch.randn(tokens, width, requires_grad=True)
        found[kind] = saved_bytes(model, lambda model=model, x=x: model(x))
    what = f"8 linear layers of {width} x {width}, {tokens} tokens"
    text = ", ".join(f"{kind} {size / 1e6:.1f} MB" for kind, size in found.items())
    print(f"saved for backward, {what}: {text}", flush=True)
    return [
        row(f"{what}: saved / SHiRA's", found["sparse"] / found["SHiRA"], SAVED, "ratio"),
        row(f"{what}: saved / LoRA's", found["sparse"] / found["LoRA"], None, "ratio"),
    ]


class Spiel:
    """SpIEL's parts of a period, driven by hand as the trainer would."""

    def __init__(self, model: Any, step: Callable[[], None], growth: str) -> None:
        from deltaloom.engine.train import TrainSettings
        from deltaloom.tune._reselection import Reselection
        from deltaloom.tune.spiel import Spiel as Method

        self.companion = Reselection(model, Method(growth=growth))  # pyright: ignore
        settings = TrainSettings(epochs=1, lr=1e-4, batch_size=1)
        self.optimizer = self.companion.optimizer(model, settings)
        self.step, self.growth = step, growth

    def at(self, done: int) -> Any:
        return SimpleNamespace(global_step=done, max_steps=10_000)

    def begin(self, done: int) -> None:
        self.companion.on_step_begin(None, self.at(done), None)

    def selection(self, times: dict[str, list[float]]) -> None:
        """A phase from its first step to the exchange."""
        for since in range(LOOKS):
            name = "first" if since == 0 else "look"

            def one(since: int = since) -> None:
                self.begin(PERIOD + since)
                self.step()
                if since < LOOKS - 1:
                    self.companion.on_step_end(None, self.at(PERIOD + since + 1), None)

            times.setdefault(name, []).append(seconds(one))
        last = self.at(PERIOD + LOOKS)
        times.setdefault("exchange", []).append(
            seconds(lambda: self.companion.on_step_end(None, last, None))
        )
        self.begin(PERIOD + LOOKS)

    def period(self, times: dict[str, list[float]], plain: float) -> float:
        """Mean CPU seconds of a step over one period."""
        first, look, exchange = (
            statistics.median(times[name]) for name in ("first", "look", "exchange")
        )
        return (first + (LOOKS - 1) * look + exchange + (PERIOD - LOOKS) * plain) / PERIOD


def steps(hidden: int, layers: int, tokens: int, repeats: int) -> list[dict]:
    """A whole step of a model, the methods in turn."""
    ids = torch.randint(0, 2048, (2, tokens // 2), generator=torch.Generator().manual_seed(1))
    times: dict[str, list[float]] = {}
    kinds: dict[str, Callable[[], None]] = {}
    models = {}
    for kind in ("LoRA", "SHiRA", "sparse"):
        model = models[kind] = adapted(llama(hidden, layers), kind).train()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4)
        kinds[kind] = stepper(model, ids, optimizer)
    spiels = {}
    for name, growth in (("SpIEL-AG", "gradient"), ("SpIEL-MA", "momentum")):
        spiels[name] = own = Spiel(models["sparse"], lambda: None, growth)
        own.step = kinds[name] = stepper(models["sparse"], ids, own.optimizer)
    del kinds["sparse"]
    parts: dict[str, dict[str, list[float]]] = {name: {} for name in spiels}
    for turn in range(repeats + 1):
        for name, step in kinds.items():
            spent = seconds(step)
            if turn:
                times.setdefault(name, []).append(spent)
        for name, own in spiels.items() if turn < 4 else ():
            own.selection({} if turn == 0 else parts[name])
    return report(times, parts, spiels, models, ids, f"Llama {layers} x {hidden}, {tokens} tokens")


def stepper(model: Any, ids: torch.Tensor, optimizer: Any) -> Callable[[], None]:
    def step() -> None:
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()

    return step


def report(
    times: dict, parts: dict, spiels: dict, models: dict, ids: torch.Tensor, what: str
) -> list[dict]:
    """Print the medians and make the rows."""
    plain = {name: statistics.median(found) for name, found in times.items()}
    tuned = {
        k: sum(p.numel() for p in m.parameters() if p.requires_grad) for k, m in models.items()
    }
    print(f"{what}: tuned parameters {tuned}")
    print("CPU s a step: " + ", ".join(f"{name} {one:.3f}" for name, one in plain.items()))
    results = []
    for name, own in spiels.items():
        whole = own.period(parts[name], plain[name])
        text = ", ".join(f"{k} {statistics.median(v):.3f}" for k, v in parts[name].items())
        print(f"{name}, selection: {text}; mean over {PERIOD} steps {whole:.3f}", flush=True)
        results.append(
            row(f"{what}: {name} step / LoRA's", plain[name] / plain["LoRA"], STEP, "ratio")
        )
        results.append(
            row(f"{what}: {name} with selections / LoRA's", whole / plain["LoRA"], STEP, "ratio")
        )
    results.append(
        row(f"{what}: SHiRA step / LoRA's", plain["SHiRA"] / plain["LoRA"], None, "ratio")
    )
    kept = {
        kind: saved_bytes(model, lambda model=model: model(input_ids=ids, labels=ids))
        for kind, model in models.items()
    }
    text = ", ".join(f"{kind} {size / 1e6:.0f} MB" for kind, size in kept.items())
    print(f"saved for backward, whole model: {text}")
    results.append(
        row(f"{what}: saved / SHiRA's, whole model", kept["sparse"] / kept["SHiRA"], None, "ratio")
    )
    results.append(
        row(
            f"{what}: gradient's distance to the dense one",
            distance(models["sparse"], ids),
            1e-4,
            "relative",
        )
    )
    return results


def distance(model: Any, ids: torch.Tensor) -> float:
    """Largest relative distance of any module's sparse gradient to the dense one's elements."""
    from deltaloom.core.adapters.sparse import sparse_layers

    layers = sparse_layers(model)
    dense = {}
    for name, layer in layers.items():
        layer.watches = {"default": lambda g, x, name=name: dense.__setitem__(name, g.T @ x)}
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    worst = 0.0
    for name, layer in layers.items():
        layer.watches = {}
        wanted = dense[name].flatten()[layer.sparse_indices["default"].long()]
        found = layer.sparse_values["default"].grad
        worst = max(worst, float((found - wanted).norm() / wanted.norm()))
    return worst


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small cases, under 45 s")
    parser.add_argument("--repeats", type=int, default=7, help="steps of each, of which the median")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    import peft

    print(
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {platform.machine()}, "
        f"PEFT {peft.__version__}, torch {torch.__version__}, one thread"
    )
    if options.quick:
        results = saved(512, 256) + steps(256, 2, 256, 3)
    else:
        results = saved(2048, 1024)
        results += steps(1024, 3, 1024, options.repeats)
    print(json.dumps({"bench": "sparse", "results": results}))


if __name__ == "__main__":
    main()
