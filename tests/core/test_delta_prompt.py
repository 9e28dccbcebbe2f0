"""Prompt deltas against PEFT."""

import pytest
import tiny
import torch
from changes import agree, combined, dense, trained_in

from deltaloom.core.base import Base
from deltaloom.core.delta import load
from deltaloom.core.deltas.prompt import Prompt
from deltaloom.core.errors import InputError

IDS = torch.tensor([[1, 5, 6, 8, 17, 14, 2]])


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model

    home = tmp_path_factory.mktemp("prompt")
    base = Base(model=str(tiny.base_in(home / "base")))
    kinds = {"prefix": PrefixTuningConfig, "prompt": PromptTuningConfig}
    for seed, (name, kind) in enumerate(kinds.items()):
        torch.manual_seed(seed)
        config = kind(task_type="CAUSAL_LM", num_virtual_tokens=3)
        get_peft_model(base.load(), config).save_pretrained(home / name)
    trained_in(home / "lora", base)
    return home


@pytest.fixture
def base(home):
    return Base(model=str(home / "base"))


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_laws_and_the_model(home, base, tmp_path, kind):
    from peft import PeftModel

    delta = load(home / kind, base)
    assert isinstance(delta, Prompt)
    assert delta.kind == "prompt"
    assert 1 * delta is delta
    agree(dense(2 * delta - delta), dense(delta))
    agree(dense(delta + 0.5 * delta), combined([(1.5, dense(delta))]))
    delta.save(tmp_path / "saved")
    (2 * delta).save(tmp_path / "twice")
    agree(dense(load(tmp_path / "saved", base)), dense(delta), close=False)
    agree(dense(load(tmp_path / "twice", base)), combined([(2, dense(delta))]))
    for folder, own in ((home / kind, delta), (tmp_path / "twice", 2 * delta)):
        peft = PeftModel.from_pretrained(base.load(), folder).eval()
        with torch.no_grad():
            assert torch.equal(own.apply(base)(IDS).logits, peft(IDS).logits)


def test_a_prompt_adds_to_its_own_kind_alone(home, base):
    prefix = load(home / "prefix", base)
    for other in ("prompt", "lora"):
        with pytest.raises(InputError, match="only adds to prompts of the same kind and length"):
            prefix + load(home / other, base)


def test_a_prompt_without_weights_is_refused(home, base, tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "PREFIX_TUNING"}')
    with pytest.raises(InputError, match=r"has no adapter_model\.safetensors"):
        load(tmp_path, base)
