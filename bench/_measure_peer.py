"""What lm-eval's `hf` model takes for the same requests; run by its own interpreter.

python _measure_peer.py MODEL REQUESTS.json BATCH REPEATS OUT.json
"""

import json
import sys
import time
from pathlib import Path

import torch


def main():
    model, requests, batch, repeats, out = sys.argv[1:]
    torch.set_num_threads(1)
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=model, device="cpu", dtype="float32", batch_size=int(batch))
    pairs = json.loads(Path(requests).read_text())
    seconds, values = [], []
    for _ in range(int(repeats)):
        asked = [
            Instance("loglikelihood", {}, tuple(pair), i, metadata=("t", i, 1))
            for i, pair in enumerate(pairs)
        ]
        start = time.process_time()
        values = [value for value, _ in lm.loglikelihood(asked, disable_tqdm=True)]
        seconds.append(time.process_time() - start)
    Path(out).write_text(json.dumps({"seconds": seconds, "values": values}))


if __name__ == "__main__":
    main()
