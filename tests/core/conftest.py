"""Tiny bases and adapters; real ones come from DELTALOOM_ASSETS."""

import os
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import HealthCheck, settings
from small import adapter_in

torch.set_num_threads(1)
settings.register_profile(
    "core",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("core")


@pytest.fixture(scope="session")
def assets() -> Path:
    named = os.environ.get("DELTALOOM_ASSETS")
    if not named:
        pytest.skip("DELTALOOM_ASSETS is not set")
    return Path(named)


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """A tiny Llama with tied embeddings."""
    from deltaloom.core.base import Base

    return Base(model=str(tiny.base_in(tmp_path_factory.mktemp("base") / "llama")))


@pytest.fixture(scope="session")
def other_llama(tmp_path_factory):
    """Another tiny Llama of the same shape."""
    from deltaloom.core.base import Base

    return Base(model=str(tiny.base_in(tmp_path_factory.mktemp("base") / "other", seed=9)))


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory):
    """A tiny GPT-2: Conv1D modules, tied embeddings."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from deltaloom.core.base import Base

    folder = tmp_path_factory.mktemp("base") / "gpt2"
    torch.manual_seed(1)
    config = GPT2Config(vocab_size=23, n_positions=32, n_embd=16, n_layer=2, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(folder)
    tiny.tokenizer_in(folder)
    return Base(model=str(folder))


@pytest.fixture(scope="session")
def adapter(llama, tmp_path_factory):
    """`adapter(seed=, r=, ...)`: the folder of a saved adapter over `llama`, made once."""
    made = {}

    def make(base=llama, **config):
        key = repr((base, sorted(config.items())))
        if key not in made:
            made[key] = adapter_in(tmp_path_factory.mktemp("adapter") / "a", base, **config)
        return made[key]

    return make
