"""The mergekit side of the parity by YAML; run by the interpreter that has mergekit.

    python bench/_parity_yaml_peer.py FOLDER

Sorts are made stable, draws are given and quartiles taken from whole tensors, so that what remains
to compare is arithmetic.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import mergekit.merge_methods.arcee_fusion as fusion
import torch
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from safetensors.torch import load_file

ARGSORT, SORT, RUN = torch.argsort, torch.sort, ExecuteMergeMethodTask.execute


def stable() -> None:
    """Equal elements keep the order of their places."""

    def topk(values, k, largest=True):
        order = ARGSORT(values, descending=True, stable=True)[:k]
        return torch.return_types.topk((values[order], order))

    torch.argsort = lambda *values, **how: ARGSORT(*values, stable=True, **how)
    torch.sort = lambda *values, **how: SORT(*values, stable=True, **how)
    torch.topk = topk


def given(uniform: dict[str, torch.Tensor]) -> None:
    """Draws by tensor and model, in place of the generator's."""

    def execute(self, tensors, **more):
        left = iter(uniform.get(self.output_weight.name, ()))

        def bernoulli(chances):
            own = next(left).view(chances.shape)
            return (own < chances.double()).to(chances.dtype)

        torch.bernoulli = bernoulli
        return RUN(self, tensors, **more)

    ExecuteMergeMethodTask.execute = execute


def main() -> None:
    """Every job."""
    torch.set_num_threads(1)
    home = Path(sys.argv[1])
    os.chdir(home)
    stable()
    fusion._QUANTILE_SAMPLE_SIZE = 10**12
    if (drawn := home / "draws.safetensors").exists():
        given(load_file(drawn))
    for number, (_, config) in enumerate(json.loads((home / "jobs.json").read_text())):
        out = str(home / "theirs" / str(number))
        words = bool({"tokenizer", "tokenizer_source"} & set(config))
        options = MergeOptions(copy_tokenizer=words, write_model_card=False, quiet=True)
        run_merge(MergeConfiguration.model_validate(config), out, options)


if __name__ == "__main__":
    main()
