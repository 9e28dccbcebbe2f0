"""One thread a worker: the suite runs on two cores under xdist."""

import gc
import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def pytest_collection_modifyitems(items):
    """The longest module begins first: at the end it would leave the other worker idle."""
    items.sort(key=lambda item: item.path.name != "test_conformance.py")


@pytest.fixture(scope="session", autouse=True)
def settled():
    """The Trainer collects garbage before every training: a third of a second with all these
    modules imported, several times what the training takes.
    """
    import peft  # noqa: F401
    from transformers import Trainer  # noqa: F401

    gc.collect()
    gc.freeze()
