"""Routing trained over specialists: exact where one is chosen, an ordinary adapter afterwards."""

import json

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import deltaloom
from deltaloom.core.adapters.routed import RoutedLayer
from deltaloom.core.base import Base
from deltaloom.core.delta import load
from deltaloom.core.errors import InputError
from deltaloom.merge.route import Route
from deltaloom.recipe.inspection import inspect

IDS = torch.tensor([[1, 5, 6, 8, 17, 14, 2], [1, 9, 4, 4, 11, 7, 2]])


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A base, two models whose MLPs differ, two LoRA adapters on MLPs, one on attention, rows."""
    home = tmp_path_factory.mktemp("route")
    tiny.base_in(home / "base")
    tiny.rows_in(home / "rows.jsonl", 12)
    tiny.rows_in(home / "more.jsonl", 12, offset=12)
    for seed, name in enumerate(("one", "two")):
        tiny.base_in(home / name)
        draw = torch.Generator().manual_seed(seed)
        file = home / name / "model.safetensors"
        tensors = load_file(file)
        for key, tensor in tensors.items():
            if ".mlp." in key:
                tensors[key] = tensor + 0.3 * torch.randn(tensor.shape, generator=draw)
        save_file(tensors, file, {"format": "pt"})
    for name, modules, r in (
        ("lora-a", ["up_proj", "down_proj", "gate_proj"], 3),
        ("lora-b", ["up_proj", "down_proj"], 2),
        ("attention", ["q_proj"], 2),
        ("both", ["q_proj", "up_proj"], 2),
    ):
        settings = {"modules": modules, "r": r, "lr": 5e-2, "epochs": 2, "batch_size": 6}
        deltaloom.tune(
            "lora", base=home / "base", data=home / "rows.jsonl", out=home / name, **settings
        )
    return home


def forced(model, expert):
    """Every router sends everything to one expert."""
    for layer in model.modules():
        if isinstance(layer, RoutedLayer):
            gate = layer.routed_gate["default"]
            own = gate.weight

            def certain(x, own=own):
                logits = torch.full((*x.shape[:-1], len(own)), -1e4)
                logits[..., expert] = 0.0
                return logits

            gate.forward = certain
    return model.eval()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("names", [("one", "two"), ("lora-a", "lora-b"), ("one", "lora-a")])
def test_sent_to_one_expert_it_is_that_specialist(home, run_in, names, dtype):
    base = Base(model=str(home / "base"), dtype=dtype)
    deltas = [load(home / name, base) for name in names]
    model = Route().attach(base, deltas, run_in("run"))
    for number, delta in enumerate(deltas):
        with torch.no_grad():
            wanted = delta.apply(base)(IDS).logits
            assert torch.equal(forced(model, number)(IDS).logits, wanted)


def test_linear_routes_every_layer_of_lora_experts(home, run_in):
    base = Base(model=str(home / "base"))
    deltas = [load(home / name, base) for name in ("both", "lora-a")]
    model = Route(modules="linear").attach(base, deltas, run_in("run"))
    assert sum(isinstance(module, RoutedLayer) for module in model.modules()) == 14
    with torch.no_grad():
        for number, delta in enumerate(deltas):
            wanted = delta.apply(base)(IDS).logits
            torch.testing.assert_close(forced(model, number)(IDS).logits, wanted)
    deltas[0] = load(home / "one", base)
    with pytest.raises(InputError, match="must be low-rank changes"):
        Route(modules="linear").attach(base, deltas, run_in("other"))


@pytest.fixture
def run_in(tmp_path):
    def make(name):
        return tiny.run_in(tmp_path / name)

    return make


def test_training_lowers_the_loss_and_moves_routers_only(home, tmp_path):
    found = deltaloom.merge(
        "route", base=home / "base", deltas=[home / "one", home / "lora-a"],
        data=[home / "rows.jsonl", home / "more.jsonl"], out=tmp_path / "out",
        lr=0.1, epochs=6, batch_size=8,
    )  # fmt: skip
    assert found.kind == "routed"
    base = Base(model=str(home / "base"))
    start = Route().attach(
        base, [load(home / n, base) for n in ("one", "lora-a")], tiny.run_in(tmp_path / "r")
    )
    end = found.apply(base)
    state = end.state_dict()
    same = {k: torch.equal(v, state[k]) for k, v in start.state_dict().items()}
    assert {k.split(".routed_")[1].split(".")[0] for k, kept in same.items() if not kept} == {
        "gate"
    }
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert losses[-1] < losses[0]
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["notes"]["rows"] == 24
    assert record["notes"]["left_out"] == {"one": 0.0, "lora-a": 0.0}
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["experts"] == ["one", "lora-a"]
    assert config["ranks"] == [0, 3]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "import deltaloom.core.adapters" in card
    assert "LoRA" not in card.split("## Recipe")[0]


def test_it_is_measured_like_any_delta(home, tmp_path):
    deltaloom.merge(
        "route", base=home / "base", deltas=[home / "one", home / "two"], include_base=True,
        data=[home / "rows.jsonl"], out=tmp_path / "out", epochs=1, gradient_checkpointing=True,
    )  # fmt: skip
    found = deltaloom.measure(
        "loss", base=home / "base", deltas=["base", tmp_path / "out"], tasks=home / "rows.jsonl",
        out=tmp_path / "m",
    )  # fmt: skip
    assert len(found) == 2
    assert inspect(tmp_path / "out")["kind"] == "routed adapter"


def test_what_lies_outside_is_said(home, tmp_path, capsys):
    base = Base(model=str(home / "base"))
    deltas = [load(home / name, base) for name in ("both", "lora-a")]
    run = tiny.run_in(tmp_path / "run")
    Route().attach(base, deltas, run)
    share = run.record["notes"]["left_out"]["both"]
    squares = {n: float(deltas[0].to_dense(n).square().sum()) for n in deltas[0].names()}
    attention = sum(v for n, v in squares.items() if "q_proj" in n)
    assert share == pytest.approx(attention / sum(squares.values()))
    assert "both: " in capsys.readouterr().err
    with pytest.raises(InputError, match="attention changes nothing in the routed modules"):
        Route().attach(base, [load(home / "attention", base), deltas[1]], run)


def test_bad_input(home, tmp_path):
    base = Base(model=str(home / "base"))
    one = load(home / "one", base)
    run = tiny.run_in(tmp_path / "run")
    with pytest.raises(InputError, match="needs two experts"):
        Route().merge(base, [one], run, data=[])
    with pytest.raises(InputError, match=r"modules = \['ffn'\]: .* has no such modules"):
        Route(modules=["ffn"]).attach(base, [one, one], run)
    with pytest.raises(InputError, match="layers = 3: the model has 2 modules named mlp"):
        Route(layers=3).attach(base, [one, one], run)
    config = {"base": home / "base", "deltas": [home / "one", home / "two"], "out": tmp_path / "o"}
    with pytest.raises(InputError, match="route needs data="):
        deltaloom.merge("route", **config)


def test_a_routed_delta_is_no_input_of_a_sum(home, tmp_path):
    base = Base(model=str(home / "base"))
    model = Route().attach(
        base, [load(home / n, base) for n in ("one", "two")], tiny.run_in(tmp_path / "r")
    )
    model.save_pretrained(tmp_path / "routed")
    with pytest.raises(InputError, match="chooses between its experts by the input"):
        deltaloom.merge(
            "average", base=home / "base", deltas=[home / "one", tmp_path / "routed"],
            out=tmp_path / "sum",
        )  # fmt: skip
