"""The Python face of mergekit, used as TRL's merge callback uses it."""

import json
import subprocess
import sys

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from deltaloom.core.errors import InputError
from deltaloom.mergekit import MergeConfiguration, MergeOptions, run_merge

OPTIONS = {
    "device": "auto",
    "cuda": False,
    "copy_tokenizer": True,
    "lazy_unpickle": False,
    "low_cpu_memory": False,
}
"""What the callback gives."""


@pytest.fixture
def home(tmp_path):
    """A checkpoint in its run's folder, and a target."""
    draw = torch.Generator().manual_seed(0)
    for name in ("checkpoint-3", "target"):
        folder = tmp_path / name
        folder.mkdir()
        tensors = {
            "model.embed_tokens.weight": torch.randn(12, 8, generator=draw),
            "model.layers.0.mlp.up_proj.weight": torch.randn(16, 8, generator=draw),
            "model.layers.1.mlp.up_proj.weight": torch.randn(16, 8, generator=draw),
        }
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
        (folder / "optimizer.pt").write_bytes(b"never read")
    return tmp_path


def reference(path):
    return {"model": {"path": str(path), "revision": None}, "lora": None}


def configuration(home, method):
    """The documents that the callback makes, in shape."""
    policy, target = home / "checkpoint-3", home / "target"
    if method == "linear":
        rows = [{"model": str(path), "parameters": {"weight": 0.5}} for path in (policy, target)]
        return {"merge_method": "linear", "dtype": "float16", "models": rows}
    settings = None if method == "slerp" else {"density": [1.0, 0.7, 0.1], "weight": 1.0}
    rows = [{"model": reference(target), "parameters": settings}]
    if method != "slerp":
        rows.append({"model": reference(policy), "parameters": settings})
    return {
        "merge_method": method,
        "slices": None,
        "models": rows,
        "parameters": {"t": 0.5} if method == "slerp" else {"normalize": 1.0},
        "base_model": {**reference(policy), "override_architecture": None},
        "dtype": "float16",
        "tokenizer_source": None,
        "tokenizer": None,
        "chat_template": None,
        "out_dtype": None,
    }


@pytest.mark.parametrize("method", ["linear", "ties", "dare_ties", "slerp"])
def test_as_the_callback_merges(home, method, capsys):
    config = MergeConfiguration.model_validate(configuration(home, method))
    out = home / "checkpoint-3" / "merged"
    run_merge(config, out_path=str(out), options=MergeOptions(**OPTIONS))
    merged = load_file(out / "model.safetensors")
    assert {one.dtype for one in merged.values()} == {torch.float16}
    assert not (out / "optimizer.pt").exists()
    assert MergeConfiguration.from_yaml((out / "mergekit_config.yml").read_text()) == config
    if method == "linear":
        ends = [load_file(home / n / "model.safetensors") for n in ("checkpoint-3", "target")]
        for name, got in merged.items():
            wanted = (
                0.5 * ends[0][name].half().float() + 0.5 * ends[1][name].half().float()
            ).half()
            assert torch.equal(got, wanted)
    with pytest.raises(InputError, match="already there"):
        run_merge(config, str(out), MergeOptions(quiet=True))


def test_options():
    assert MergeOptions(out_shard_size="500M").out_shard_size == 500_000_000
    with pytest.raises(ValidationError, match="no size such as"):
        MergeOptions(out_shard_size="much")
    with pytest.raises(ValidationError, match="no option 'lazy_unpickel'; did you mean"):
        MergeOptions(lazy_unpickel=True)


def test_it_stands_in_for_mergekit():
    code = (
        "import importlib.util, sys\n"
        "from deltaloom.mergekit import MergeConfiguration, run_merge, stand_in\n"
        "stand_in(); stand_in()\n"
        "assert importlib.util.find_spec('mergekit') is not None\n"
        "from mergekit.config import MergeConfiguration as C\n"
        "from mergekit.merge import MergeOptions, run_merge as r\n"
        "assert C is MergeConfiguration and r is run_merge\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_with_trls_own_callback(home):
    pytest.importorskip("trl")
    code = (
        "import sys, types\n"
        "from deltaloom.mergekit import stand_in\n"
        "stand_in()\n"
        "from trl.experimental.merge_model_callback import MergeConfig, MergeModelCallback\n"
        "config = MergeConfig('ties')\n"
        "config.target_model_path = sys.argv[1] + '/target'\n"
        "where = types.SimpleNamespace(output_dir=sys.argv[1])\n"
        "state = types.SimpleNamespace(global_step=3)\n"
        "MergeModelCallback(config).on_train_end(where, state, None, model=None)\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(home)], check=True)
    assert (home / "checkpoint-3" / "merged" / "model.safetensors").exists()
