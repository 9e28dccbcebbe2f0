"""Every method that runs a model keeps its tensors together where the model is not on the CPU."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import tiny
import torch
from elsewhere import HERE, Away, MixedDevices, elsewhere, moved
from peft import get_peft_model
from torch.optim import optimizer
from transformers import TrainingArguments

from deltaloom import testing
from deltaloom.core.adapters._sparse_product import Layout
from deltaloom.core.adapters.sparse import SparseConfig, random_support, sparse_layers
from deltaloom.core.base import Base
from deltaloom.engine import train
from deltaloom.engine.train import TrainSettings
from deltaloom.tune._growth import exchange, largest_gradients, largest_products
from deltaloom.tune._supports import overlap, split, top

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::FutureWarning")
IDS = torch.tensor([[1, 5, 6, 8, 17, 14, 2], [1, 9, 7, 4, 12, 5, 2]])
ROWS = 10
SHORT = {"epochs": 1, "batch_size": 5}
RUNS = [
    *(("select", name, {}) for name in ("delift", "facility", "less", "rds")),
    *(("tune", name, SHORT) for name in ("full", "lora", "conditional", "prompt")),
    *(
        ("tune", "mezo", {"steps": 2, "batch_size": 2, **kind})
        for kind in (
            {"direction": "lowrank"},
            {"direction": "gaussian", "update": "adam", "lr": 1e-4},
            {"direction": "rademacher", "update": "momentum", "lr": 1e-4},
            {"tuned": "lora"},
            {"tuned": "prefix"},
        )
    ),
    *(
        ("tune", "meta", {"steps": 1, "tasks": 2, "shots": 2, "queries": 2, **kind})
        for kind in (
            {"inner": "kernel", "order": "whole"},
            {"inner": "energy"},
            {"inner": "gradient"},
            {"inner": "reptile", "tuned": "full"},
        )
    ),
    ("tune", "kernel", {}),
    ("tune", "prefer", SHORT),
    ("tune", "prompt", {**SHORT, "form": "prefix"}),
    *(
        ("tune", "spiel", {**SHORT, "growth": kind, "reselect": 1, "accumulate": 1})
        for kind in ("gradient", "momentum")
    ),
    *(
        ("tune", "ltsft", {**SHORT, "support": kind})
        for kind in ("lottery", "random", "magnitude", "gradient")
    ),
    *(
        ("tune", "clear", {**SHORT, "epochs": 2, "warm_up": 1, **kind})
        for kind in (
            {"adapter": "lora"},
            {"adapter": "bottleneck"},
            {"adapter": "prefix"},
            {"rule": "drop"},
        )
    ),
    *(("measure", name, {}) for name in ("answer", "choice", "cka", "context", "kernel")),
    *(("measure", name, {}) for name in ("loss", "similarity")),
    *(("merge", name, {}) for name in ("fisher", "regmean", "route")),
    ("transfer", "zett", {}),
]


@pytest.fixture
def away(monkeypatch):
    """Every model is loaded to the other device and trained there; the models."""
    load, loaded = Base.load, []

    def loading(self, *args, **kwargs):
        with monkeypatch.context() as patch:
            patch.setattr(Base, "resolved_device", lambda self: "cpu")
            model = moved(load(self, *args, **kwargs))
        loaded.append(model)
        return model

    monkeypatch.setattr(Base, "load", loading)
    monkeypatch.setattr(Base, "resolved_device", lambda self: HERE.type)
    monkeypatch.setattr(optimizer, "_get_fused_kernels_supported_devices", lambda: [HERE.type])
    # What only real accelerators have: autocast (off here) and generators of their own.
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    make = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda device="cpu": make())
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", str(HERE))
    with elsewhere():
        yield loaded


def few(given, home, rows=ROWS):
    """Inputs of the suite with a few rows of each file."""
    found = {}
    for key, value in given.items():
        files = value if isinstance(value, list) else [value]
        if key in ("pool", "target", "data", "tasks"):
            files = [cut(Path(f), home / f"{number}-{key}", rows) for number, f in enumerate(files)]
        found[key] = files if isinstance(value, list) else files[0]
    return found


def cut(file, home, rows):
    home.mkdir(exist_ok=True)
    lines = file.read_text().splitlines(keepends=True)[:rows]
    (home / file.name).write_text("".join(lines))
    return str(home / file.name)


def named(run):
    verb, name, settings = run
    kinds = [str(value) for value in settings.values() if isinstance(value, str)]
    return "-".join([verb, name, *kinds])


@pytest.mark.parametrize("run", RUNS, ids=named)
def test_it_runs(away, run, tmp_path, monkeypatch):
    verb, name, settings = run
    inputs, rows = testing.inputs, 100 if name == "meta" else ROWS  # two of every source
    monkeypatch.setattr(testing, "inputs", lambda verb: few(inputs(verb), tmp_path, rows))
    testing.run(testing.entry(verb, name), tmp_path / "out", **settings)
    assert away
    assert all(isinstance(p, Away) for model in away for p in model.parameters())


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return Base(model=str(tiny.base_in(tmp_path_factory.mktemp("devices") / "base")), device="cpu")


def test_the_device_refuses_tensors_of_the_cpu(base, away):
    model = base.load()
    with pytest.raises(MixedDevices):
        model(IDS)
    with pytest.raises(MixedDevices):
        IDS.to(HERE) + IDS
    with pytest.raises(RuntimeError):
        IDS.to(HERE).numpy()


def adapted(base):
    model = get_peft_model(base.load(), SparseConfig(target_modules="all-linear", density=0.1))
    with torch.no_grad():
        for number, layer in enumerate(sparse_layers(model).values()):
            values = layer.sparse_values["default"]
            dice = torch.Generator().manual_seed(number)
            values.copy_(torch.randn(values.shape, generator=dice) * 0.3)
    return model


def seen(model, place):
    """Logits, those of the merged model, and gradients, on the CPU."""
    ids = IDS.to(place)
    out = model(input_ids=ids, labels=ids)
    out.loss.backward()
    gradients = [p.grad.cpu() for p in model.parameters() if p.requires_grad]
    model.merge_adapter()
    merged = model(input_ids=ids).logits.detach().cpu()
    model.unmerge_adapter()
    return [out.logits.detach().cpu(), merged, *gradients]


def test_a_sparse_adapter_says_the_same_there(base, request):
    here = seen(adapted(base), "cpu")
    request.getfixturevalue("away")
    there = seen(adapted(base), HERE)
    for a, b in zip(here, there, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def chosen(place):
    """What every function of supports says to the same numbers."""
    torch.manual_seed(0)
    layout = Layout(12, 9, False)
    where, values = random_support(108, 20, 0).to(place), torch.randn(20).to(place)
    g, x = torch.randn(30, 12).to(place), torch.randn(30, 9).to(place)
    offered = largest_gradients(g, x, layout, 20)
    found = exchange(values, where, 8, offered, torch.randn(20).to(place))
    rows, columns = torch.rand(12).to(place), torch.rand(9).to(place)
    scores = {"a": torch.randn(6, 5).to(place), "b": torch.randn(40).to(place)}
    sizes = {"a": 30, "b": 78}
    parts = split(where, sizes)
    return [
        *(offered, *found, *largest_products(rows, columns, layout, where, 10)),
        *(*top(scores, 9).values(), *parts.values()),
        torch.tensor(overlap(parts, split(random_support(108, 20, 1), sizes))),
    ]


def test_functions_of_supports_say_the_same_there():
    here = chosen("cpu")
    with elsewhere():
        there = chosen(HERE)
    for a, b in zip(here, there, strict=True):
        torch.testing.assert_close(a, b.cpu())


@pytest.mark.parametrize(("kind", "wanted"), [("cpu", ("cpu", 0, 8)), ("cuda", ("cuda", 1, 8))])
def test_a_model_is_trained_where_it_is_on_one_device(tmp_path, monkeypatch, kind, wanted):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    settings = TrainSettings(epochs=1, lr=1e-3, batch_size=8)
    given = train.training_arguments(settings, tmp_path, 4, 2, 0, kind)
    found = train.on_one_device(TrainingArguments(**given))
    assert (found.device.type, found.n_gpu, found.train_batch_size) == wanted
    assert found.dataloader_pin_memory == (kind == "cuda")
