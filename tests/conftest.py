"""One thread a worker: the suite runs on two cores under xdist."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def pytest_collection_modifyitems(items):
    """The longest module begins first: at the end it would leave the other worker idle."""
    items.sort(key=lambda item: item.path.name != "test_conformance.py")
