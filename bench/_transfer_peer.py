"""mergekit's OMP on some of the new tokens, in its own environment; prints one JSON object.

    python bench/_transfer_peer.py MODEL DONOR TOKENS ROWS.npy

The functions are those that `mergekit-tokensurgeon -a omp` calls, with its default batch of 512;
the rows of the first TOKENS new tokens, by the donor's number, go to ROWS.npy.
"""

import json
import sys
import time

import numpy as np
import torch
from mergekit.common import ModelReference
from mergekit.options import MergeOptions
from mergekit.scripts import tokensurgeon as peer

torch.set_num_threads(1)


def main() -> None:
    model, donor, count, rows = sys.argv[1:]
    options = peer.TokenSurgeonOptions(
        model=ModelReference.model_validate(model),
        donor=ModelReference.model_validate(donor),
        out_path="",
        method=peer.ApproximationMethod.ORTHOGONAL_MATCHING_PURSUIT,
    )
    merge = MergeOptions()
    peer.LoaderCache().setup(options=merge)
    own, table, _ = peer.get_stuff(options.model, merge)
    theirs, given, _ = peer.get_stuff(options.donor, merge, get_tied=True)
    new = sorted((one for one in theirs if one not in own), key=lambda one: theirs[one])
    chosen = new[: int(count)]
    start, made = time.process_time(), []
    for first in range(0, len(chosen), 512):
        part = chosen[first : first + 512]
        made.append(
            peer.compute_new_embeddings(table, given, own, theirs, part, False, None, None, options)
        )
    spent = time.process_time() - start
    np.save(rows, torch.cat(made).float().numpy())
    numbers = [theirs[one] for one in chosen]
    print(json.dumps({"seconds": spent, "new": len(new), "done": len(chosen), "ids": numbers}))


if __name__ == "__main__":
    main()
