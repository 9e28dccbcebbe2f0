"""Every method on disk passes the suite that the package ships."""

import pytest
import torch

from deltaloom import methods, testing

torch.set_num_threads(1)


@pytest.mark.parametrize("check", testing.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("entry", methods(), ids=lambda entry: f"{entry.verb}-{entry.name}")
def test_conformance(entry, check, tmp_path):
    for package in entry.load().requires:
        pytest.importorskip(package)
    check(entry, tmp_path)
