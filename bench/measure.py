"""Generation against a plain `generate` loop, and log-likelihoods against lm-eval's `hf` model.

    python bench/measure.py [--quick] [--peer-python PATH] [--repeats N]

Random Llamas of two sizes with a vocabulary of 8,192, in float32, one thread, CPU seconds. The
plain loop calls transformers' `generate` on batches of as many rows, in input order, padded to the
longest row of each; both generate as many tokens. Requests of log-likelihoods are questions with
four choices of several tokens (`shared`), with choices of one token (`single`), and texts alone
(`alone`); ours begin from the texts as lm-eval does and the values are compared. `--peer-python` is
the interpreter that has lm-eval; without it that part is left out.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from deltaloom.engine.forward import token_logprobs
from deltaloom.engine.generate import generate

VOCABULARY, BATCH = 8192, 16
SIZES = {"small": (128, 4), "large": (320, 8)}
PEER = Path(__file__).with_name("_measure_peer.py")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--peer-python", help="interpreter with lm-eval")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    repeats = 1 if options.quick else options.repeats
    results: list[dict] = []
    with tempfile.TemporaryDirectory() as scratch:
        for size in ("small",) if options.quick else SIZES:
            folder = model_in(Path(scratch) / size, *SIZES[size])
            model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
            results += generation(model, tokenizer, size, repeats, options.quick)
            if options.peer_python:
                results += likelihood(
                    model, tokenizer, folder, size, repeats, options.quick, options.peer_python
                )
    if not options.peer_python:
        print("no --peer-python with lm-eval: log-likelihoods are not compared")
    if options.quick:  # one repeat of a small case shows that it runs, and nothing else
        results = [{**one, "bound": None, "holds": True} for one in results]
    print(json.dumps({"bench": "measure", "results": results}))


def model_in(folder: Path, hidden: int, layers: int) -> Path:
    """A random Llama with a tokenizer of one token a word, and no token that ends a text."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=3 * hidden,
        num_hidden_layers=layers, num_attention_heads=8, num_key_value_heads=4,
        max_position_embeddings=512, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    words = {f"w{i}": i for i in range(VOCABULARY)}
    core = Tokenizer(models.WordLevel(words, unk_token="w2"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="w0", eos_token="w1", pad_token="w2", unk_token="w2"
    ).save_pretrained(folder)
    return folder


def generation(model: Any, tokenizer: Any, size: str, repeats: int, quick: bool) -> list[dict]:
    """Tokens a second of ours over the plain loop's."""
    rng = np.random.default_rng(0)
    count, new = (32, 16) if quick else (64, 48)
    kinds = {
        "equal": [64] * count,
        "ragged": rng.integers(8, 200, count).tolist(),
    }
    results = []
    for kind, lengths in kinds.items():
        prompts = [rng.integers(3, VOCABULARY, k).tolist() for k in lengths]

        def ours(prompts: list = prompts) -> int:
            budget = BATCH * (max(map(len, prompts)) + new)
            found = generate(model, tokenizer, prompts, new, tokens_per_batch=budget)
            return sum(one.new_tokens for one in found)

        def plain(prompts: list = prompts) -> int:
            return sum(
                plain_batch(model, prompts[i : i + BATCH], new)
                for i in range(0, len(prompts), BATCH)
            )

        ratio, speed = compared(ours, plain, repeats)
        print(f"{size} {kind}: {speed[0]:.0f} tokens/s, plain loop {speed[1]:.0f}: {ratio:.2f}")
        floor = 0.8 if kind == "equal" else 1.0
        results.append({"name": f"generation, {kind} prompts, {size} model", "value": ratio,
                        "bound": f">= {floor}" if kind == "equal" else "> 1",
                        "holds": ratio >= floor, "unit": "of a plain loop's tokens/s"})  # fmt: skip
    return results


def plain_batch(model: Any, prompts: list[list[int]], new: int) -> int:
    """What people write: pad on the left, call generate, count the new tokens."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), 2)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, width - len(prompt) :] = torch.tensor(prompt)
        mask[i, width - len(prompt) :] = 1
    with torch.inference_mode():
        out = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=2
        )
    texts = out[:, width:].tolist()
    return sum(row.index(1) + 1 if 1 in row else len(row) for row in texts)


def compared(
    ours: Callable[[], int], theirs: Callable[[], int], repeats: int
) -> tuple[float, tuple[float, float]]:
    """Median ratio of speeds over repeats side by side, and both median speeds."""
    speeds: list[tuple[float, float]] = []
    for _ in range(repeats + 1):
        pair = []
        for job in (ours, theirs):
            start = time.process_time()
            tokens = job()
            pair.append(tokens / (time.process_time() - start))
        speeds.append((pair[0], pair[1]))
    kept = speeds[1:]  # the first one warms up
    ratio = statistics.median(a / b for a, b in kept)
    a, b = (statistics.median(column) for column in zip(*kept, strict=True))
    return round(ratio, 3), (a, b)


def requests(kind: str, quick: bool) -> list[tuple[str, str]]:
    """Contexts and continuations."""
    rng = random.Random(kind)
    count = 10 if quick else 40

    def text(low: int, high: int) -> str:
        return " ".join(f"w{rng.randrange(3, VOCABULARY)}" for _ in range(rng.randint(low, high)))

    if kind == "alone":
        return [(text(20, 120), " " + text(20, 60)) for _ in range(count)]
    length = (5, 20) if kind == "shared" else (1, 1)
    return [
        (context, " " + text(*length)) for context in (text(40, 160) for _ in range(count))
        for _ in range(4)
    ]  # fmt: skip


def likelihood(
    model: Any, tokenizer: Any, folder: Path, size: str, repeats: int, quick: bool, peer: str
) -> list[dict]:
    """Seconds of lm-eval over ours, on the same requests, texts to values."""
    results = []
    for kind in ("shared", "single", "alone"):
        pairs = requests(kind, quick)
        asked, out = folder / "requests.json", folder / "peer.json"
        asked.write_text(json.dumps(pairs))
        subprocess.run(
            [peer, str(PEER), str(folder), str(asked), str(BATCH), str(repeats + 1), str(out)],
            check=True, capture_output=True,
        )  # fmt: skip
        theirs = json.loads(out.read_text())
        seconds, values = [], []
        for _ in range(repeats + 1):
            start = time.process_time()
            values = [
                float(one.sum()) for one in token_logprobs(model, encoded(tokenizer, pairs), 2)
            ]
            seconds.append(time.process_time() - start)
        apart = max(abs(a - b) for a, b in zip(values, theirs["values"], strict=True))
        ours, other = (statistics.median(s[1:]) for s in (seconds, theirs["seconds"]))
        ratio = round(other / ours, 3)
        print(f"{size} {kind}: ours {ours:.2f} s, lm-eval {other:.2f} s: {ratio:.2f} "
              f"(values apart by {apart:.1e} at most)")  # fmt: skip
        floor = 1.3 if kind == "shared" else 1.0
        results.append({"name": f"log-likelihood, {kind}, {size} model", "value": ratio,
                        "bound": f">= {floor}", "holds": ratio >= floor and apart < 1e-2,
                        "unit": "of lm-eval hf's time"})  # fmt: skip
    return results


def encoded(tokenizer: Any, pairs: list[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
    """Tokens of context and continuation, the continuation's scored."""
    contexts = tokenizer([context for context, _ in pairs])["input_ids"]
    wholes = tokenizer([context + more for context, more in pairs])["input_ids"]
    return [
        (whole, [0] * len(context) + [1] * (len(whole) - len(context)))
        for context, whole in zip(contexts, wholes, strict=True)
    ]


if __name__ == "__main__":
    main()
