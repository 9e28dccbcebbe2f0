"""`deltaloom merge` of adapters by a plain sum: one adapter comes out, and PEFT reads it."""

import json
import subprocess
import sys

import peft
import pytest
import tiny
import torch
from safetensors.torch import load_file

from deltaloom.cli.main import app
from deltaloom.core.base import Base
from deltaloom.core.delta import load
from deltaloom.core.errors import InputError

KINDS = {
    "lora": {"r": 3, "lora_alpha": 5},
    "rslora": {"r": 4, "lora_alpha": 5, "use_rslora": True},
    "dora": {"r": 2, "use_dora": True},
    "bias": {"r": 2, "bias": "all"},
    "beside": {"r": 2, "lora_bias": True},
    "head": {"r": 2, "modules_to_save": ["norm"]},
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A base and an adapter of each kind, none of them zero."""
    home = tmp_path_factory.mktemp("adapters")
    base = Base(model=str(tiny.base_in(home / "base", attention_bias=True, mlp_bias=True)))
    for seed, (name, settings) in enumerate(KINDS.items()):
        torch.manual_seed(seed)
        config = peft.LoraConfig(target_modules=["q_proj", "up_proj"], **settings)
        model = peft.get_peft_model(base.load(), config)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(home / name)
    return home


def words(home, method, names, out, *settings):
    deltas = ",".join(str(home / name) for name in names)
    return ["merge", method, f"base={home / 'base'}", f"deltas=[{deltas}]", f"out={out}", *settings]


def quickly(*asked):
    """The command in this process; returns the folder it wrote."""
    app(words(*asked), standalone_mode=False)
    return asked[3]


IDS = torch.tensor([[1, 5, 9, 7, 12, 4]])


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def through_peft(home, folder):
    return logits(peft.PeftModel.from_pretrained(Base(model=str(home / "base")).load(), folder))


def by_weights(home, names, factors):
    """Logits of base + sum factor (what PEFT merges into the weights - base)."""
    base = Base(model=str(home / "base"))
    model, own = base.load(), base.load().state_dict()
    total = {name: tensor.double() for name, tensor in own.items()}
    for name, factor in zip(names, factors, strict=True):
        whole = peft.PeftModel.from_pretrained(base.load(), home / name).merge_and_unload()
        for key, tensor in whole.state_dict().items():
            total[key] += factor * (tensor.double() - own[key].double())
    model.load_state_dict({key: tensor.float() for key, tensor in total.items()})
    return logits(model)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("method", ["average", "task_arithmetic"])
def test_one_adapter_comes_back_itself(home, tmp_path, name, method):
    out = quickly(home, method, [name], tmp_path / "out")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (out / file).read_bytes() == (home / name / file).read_bytes()
    assert not (out / "model.safetensors").exists()


@pytest.mark.parametrize(
    "names",
    [
        ("lora", "rslora"),
        ("lora", "dora"),
        ("bias", "lora"),
        ("beside", "lora"),
        ("head", "rslora"),
    ],
)
def test_a_sum_reloads_in_peft_with_the_same_logits(home, tmp_path, names):
    out = quickly(home, "task_arithmetic", names, tmp_path / "out", "weights=[0.5,2]", "scale=0.7")
    wanted = by_weights(home, names, [0.35, 1.4])
    assert torch.allclose(through_peft(home, out), wanted, atol=2e-5)
    assert not torch.allclose(wanted, logits(Base(model=str(home / "base")).load()), atol=1e-2)


def test_the_whole_command_adds_ranks_and_cuts_them_when_asked(home, tmp_path):
    command = words(home, "average", ["lora", "rslora"], tmp_path / "exact", "--json")
    done = subprocess.run(
        [sys.executable, "-m", "deltaloom", *command], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout)["notes"]["rank"] == 7
    ranks = {
        tensor.shape[0]
        for name, tensor in load_file(tmp_path / "exact/adapter_model.safetensors").items()
        if "lora_A" in name
    }
    assert ranks == {7}
    out = quickly(home, "average", ["lora", "rslora"], tmp_path / "cut", "rank=2")
    base = Base(model=str(home / "base"))
    exact, cut = load(tmp_path / "exact", base), load(out, base)
    energies = []
    for name in exact.names():
        u, s, v = torch.linalg.svd(exact.to_dense(name).double(), full_matrices=False)
        nearest = (u[:, :2] * s[:2]) @ v[:2]
        assert torch.allclose(cut.to_dense(name).double(), nearest, atol=1e-6)
        energies.append(float((s[:2] ** 2).sum() / (s**2).sum()))
    kept = json.loads((out / "run.json").read_text())["notes"]["energy_kept"]
    assert kept["least"] == pytest.approx(min(energies), rel=1e-4)


def test_a_model_among_them_or_another_method_makes_a_model(home, tmp_path):
    made = quickly(home, "average", ["lora", "rslora"], tmp_path / "model", "form=model")
    for out in (
        made,
        quickly(home, "average", ["lora", "base"], tmp_path / "mixed"),
        quickly(home, "ties", ["lora", "rslora"], tmp_path / "ties"),
    ):
        assert (out / "model.safetensors").exists()
        assert not (out / "adapter_config.json").exists()
    wanted = by_weights(home, ["lora", "rslora"], [0.5, 0.5])
    assert torch.allclose(logits(Base(model=str(made)).load()), wanted, atol=2e-5)


@pytest.mark.parametrize(
    ("method", "names", "settings", "said"),
    [
        ("ties", ["lora"], ["form=adapter"], "needs a plain sum, not sparsify=magnitude"),
        ("average", ["lora"], ["form=model", "rank=2"], "rank belongs to merged adapters"),
        ("average", ["lora", "base"], ["rank=2"], "delta 2 is no low-rank adapter"),
    ],
)
def test_what_cannot_be_an_adapter_is_refused(home, tmp_path, method, names, settings, said):
    with pytest.raises(InputError, match=said):
        quickly(home, method, names, tmp_path / "out", *settings)
    assert not (tmp_path / "out").exists()


def test_a_sum_that_no_adapter_can_say_names_the_way_out(tmp_path):
    base = Base(model=str(tiny.base_in(tmp_path / "base")))  # without biases
    for name in ("dora", "beside"):
        config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False, **KINDS[name])
        peft.get_peft_model(base.load(), config).save_pretrained(tmp_path / name)
    with pytest.raises(InputError, match="or set form=model"):
        quickly(tmp_path, "average", ["dora", "beside"], tmp_path / "out")
