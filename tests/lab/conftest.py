import pytest

from deltaloom.lab import build_world, shipped_model, write_lab
from deltaloom.lab.tokenizer import build_tokenizer


@pytest.fixture(scope="session")
def world():
    return build_world()


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="session")
def base():
    return shipped_model()


@pytest.fixture(scope="session")
def paths(tmp_path_factory):
    return write_lab(tmp_path_factory.mktemp("lab"), seed=3, size="small")
