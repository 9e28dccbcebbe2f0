"""Quantised bases: adapters are tuned on them and come back, changes of weights are refused."""

import json
import shutil
from importlib.util import find_spec

import pytest
import tiny
import torch

import deltaloom
from deltaloom.core.base import Base
from deltaloom.core.delta import load
from deltaloom.core.errors import InputError

quantises = pytest.mark.skipif(not find_spec("bitsandbytes"), reason="bitsandbytes is missing")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
IDS = torch.tensor([[1, 4, 7, 9, 2]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Sides that bitsandbytes' blocks divide."""
    home = tmp_path_factory.mktemp("wide")
    return tiny.base_in(home, hidden_size=64, intermediate_size=128)


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = [{"prompt": f"name {n}:", "completion": " abc"} for n in range(8)]
    path.write_text("".join(json.dumps(one) + "\n" for one in lines))
    return path


def logits(model):
    with torch.inference_mode():
        return model(IDS.to(model.device)).logits.float()


def added(model, delta):
    """Logits after `delta` is added in float32 to the weights that a quantised model stands for."""
    from peft.utils.integrations import dequantize_module_weight

    plain = Base(model=model.name_or_path).load()
    with torch.no_grad():
        for name, module in plain.named_modules():
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                own = dequantize_module_weight(model.get_submodule(name)).float()
                module.weight.copy_(own + delta.to_dense(f"{name}.weight"))
    return logits(plain)


@quantises
@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("method", ["spiel", "lora"])
def test_adapters_are_tuned_on_it_and_come_back(folder, rows, tmp_path, kind, method):
    base = {"model": str(folder), "quantization": kind}
    out = tmp_path / "tuned"
    deltaloom.tune(method, base=base, data=rows, out=out, lr=3e-2, epochs=4, batch_size=2)
    small, full = Base(**base), Base(model=str(folder))
    plain = logits(small.load())
    assert not torch.equal(plain, logits(full.load()))
    tuned = logits(load(out, small).apply(small))
    assert not torch.allclose(tuned, plain, atol=1e-3)
    assert torch.equal(tuned, logits(load(out, small).apply(small)))
    # What is added to the weights that the few bits stand for; products round activations, too.
    expected = added(small.load(), load(out, small))
    assert (tuned - expected).norm() < 0.25 * (tuned - plain).norm()
    merged = load(out, full).apply(full)  # stored weights know nothing of quantisation
    assert not torch.equal(logits(merged), logits(full.load()))


@quantises
@pytest.mark.parametrize("method", ["full", "mezo", "ltsft"])
def test_methods_that_change_the_weights_refuse_it(folder, rows, tmp_path, method):
    base = {"model": str(folder), "quantization": "int8"}
    with pytest.raises(InputError, match="quantization = int8 leaves weights that cannot be"):
        deltaloom.tune(method, base=base, data=rows, out=tmp_path / "out")


@quantises
def test_dense_changes_are_refused(folder):
    from deltaloom.core.deltas.dense import Dense

    base = Base(model=str(folder), quantization="int8")
    with pytest.raises(InputError, match="leaves weights that cannot be changed"):
        Dense(base, ()).apply(base)


def test_without_bitsandbytes_the_extra_is_named(folder, monkeypatch):
    monkeypatch.setattr("deltaloom.core.base.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'deltaloom\[quantized\]' \(or"):
        Base(model=str(folder), quantization="nf4").load()


def test_weights_stored_quantised_are_refused(folder, tmp_path):
    copy = tmp_path / "stored"
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"config\.json: these weights are stored quantised"):
        Base(model=str(copy)).check()
