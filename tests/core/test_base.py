"""Bases: what is missing from a model folder is said before anything is loaded."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from deltaloom.core.base import Base
from deltaloom.core.errors import InputError


@pytest.fixture
def copy(llama, tmp_path):
    """A folder like the tiny model's that a test may break."""
    folder = tmp_path / "model"
    shutil.copytree(llama.model, folder)
    return folder


def sharded(llama, folder):
    model = llama.load()
    model.save_pretrained(folder, max_shard_size="8KB")
    assert (folder / "model.safetensors.index.json").exists()
    (folder / "model.safetensors").unlink()
    return sorted(folder.glob("model-*.safetensors"))


def refuses(folder, message, call=Base.check):
    with pytest.raises(InputError, match=message) as caught:
        call(Base(model=str(folder)))
    assert str(folder) in str(caught.value)


def test_a_whole_folder_checks_loads_and_tokenises(copy):
    base = Base(model=str(copy))
    base.check()
    model = base.load()
    assert not model.training
    assert model.dtype == torch.float32
    assert base.max_length == 64
    assert base.tokenizer().padding_side == "right"


def test_dtype_is_the_checkpoints_the_bases_or_the_calls(copy):
    assert Base(model=str(copy), dtype="bfloat16").load().dtype == torch.bfloat16
    assert Base(model=str(copy), dtype="bfloat16").load("float32").dtype == torch.float32


@pytest.mark.parametrize("name", ["/no/such/model", "./model", "~/none/model", "a/b/c"])
def test_a_folder_that_is_not_there_is_named(name):
    with pytest.raises(InputError, match=f"^{name}: no such folder; check the path"):
        Base(model=name).check()


@pytest.mark.parametrize("device", ["cuda:99", "gpu"])
def test_a_device_that_is_not_there_is_named(copy, device):
    with pytest.raises(InputError, match=rf"base.device = {device}: cannot be used here \(.+\)"):
        Base(model=str(copy), device=device).load()


def test_an_unknown_hub_id_is_named():
    with pytest.raises(InputError, match=r"^nobody/nothing: neither a local folder nor"):
        Base(model="nobody/nothing").check()


def test_a_folder_that_lacks_a_shard_names_it(llama, copy):
    gone = sharded(llama, copy)[1]
    gone.unlink()
    for call in (Base.check, Base.load):
        refuses(copy, f"lists {gone.name} .*copy the shard or download the model again", call)


def test_a_truncated_shard_is_named(llama, copy):
    cut = sharded(llama, copy)[0]
    cut.write_bytes(cut.read_bytes()[:-10])
    for call in (Base.check, Base.load):
        refuses(copy, f"{cut.name} is cut short.*copy or download it again", call)


def test_shards_load_as_one(llama, copy):
    sharded(llama, copy)
    ours = Base(model=str(copy)).load().state_dict()
    for name, weight in llama.load().state_dict().items():
        assert torch.equal(ours[name], weight)


def test_weights_that_lack_a_tensor_are_never_filled_with_noise(copy):
    weights = load_file(copy / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    refuses(copy, r"weights lack model.layers.1.mlp.up_proj.weight \(1 tensors in all\)", Base.load)


def test_no_weights_no_config_no_tokenizer(copy):
    for name, message in [
        ("tokenizer*", "has no tokenizer .*save the model's tokenizer there"),
        ("config.json", "has no config.json: not a model folder"),
        ("model.safetensors", "is not a model folder"),
    ]:
        for path in copy.glob(name):
            path.unlink()
        refuses(copy, message)


def test_an_adapter_is_no_base_and_the_way_to_one_is_named(copy):
    (copy / "config.json").rename(copy / "adapter_config.json")
    refuses(copy, "it is an adapter; merge it with form=model first", Base.config)


def test_pickled_weights_are_not_read(copy):
    (copy / "model.safetensors").unlink()
    torch.save({}, copy / "pytorch_model.bin")
    refuses(copy, "pytorch_model.bin, a pickle, which is never read")
    refuses(copy, "holds no .safetensors file; convert the weights first", Base.fingerprint)


@pytest.mark.parametrize(
    ("text", "message"), [('{"a":\n}', "config.json line 2: not JSON"), ("[]", "must be an object")]
)
def test_a_broken_config_is_named(copy, text, message):
    (copy / "config.json").write_text(text)
    refuses(copy, message)


def test_an_unknown_architecture_is_named(copy):
    config = json.loads((copy / "config.json").read_text())
    config |= {"model_type": "bert", "architectures": ["NoSuchModel"]}
    (copy / "config.json").write_text(json.dumps(config))
    refuses(copy, "the weights lack|the model does not load", Base.load)


def test_a_broken_tokenizer_is_named(copy):
    (copy / "tokenizer.json").write_text("{")
    refuses(copy, "the tokenizer does not load", Base.tokenizer)


def test_a_tokenizer_without_pad_token_gets_one(copy):
    path = copy / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "pad_token": None}))
    found = Base(model=str(copy)).tokenizer()
    assert (found.pad_token, found.pad_token_id) == ("</s>", 2)
    path.write_text(json.dumps({**config, "pad_token": None, "eos_token": None}))
    assert Base(model=str(copy)).tokenizer().pad_token_id == 0


def test_the_fingerprint_is_of_the_weights_wherever_they_lie(llama, other_llama, copy):
    same = Base(model=str(copy)).fingerprint()
    assert same == llama.fingerprint() != other_llama.fingerprint()
    (copy / "config.json").write_text("{}")
    assert Base(model=str(copy)).fingerprint() == same
    weights = load_file(copy / "model.safetensors")
    weights["model.norm.weight"][3] += 1e-3
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert Base(model=str(copy)).fingerprint() != same


def test_a_base_is_never_changed(llama):
    before = llama.fingerprint()
    model = llama.load()
    with torch.no_grad():
        model.get_input_embeddings().weight.zero_()
    assert llama.fingerprint() == before
    assert llama.load().get_input_embeddings().weight.abs().sum() > 0


@pytest.mark.parametrize("name", ["stories260K", "TinyStories-656K"])
def test_real_models_are_whole(assets, name):
    base = Base(model=str(assets / "models" / name))
    base.check()
    model, tokenizer = base.load(), base.tokenizer()
    ids = tokenizer("Once upon a time", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.isfinite(model(input_ids=ids).logits).all()
    assert base.max_length == model.config.max_position_embeddings


def test_a_real_encoder_is_no_whole_causal_model(assets):
    with pytest.raises(InputError, match=r"weights lack cls.predictions.bias .*BertLMHeadModel"):
        Base(model=str(assets / "models" / "all-MiniLM-L6-v2")).load()
