"""Moving to another tokenizer: OMP and FVT, whole command, beside mergekit-tokensurgeon.

    python bench/transfer.py [--quick] [--peer-python PATH] [--peer-tokens N] [--work DIR]

Two byte-level BPE vocabularies are trained here, on the standard library's sources and on torch's,
and two tied Llamas of one thin layer get tables for them (full: 32,000 x 1024) whose rows are two
linear views of one latent vector a token, of falling spectrum, with noise. CPU seconds are user +
system of the whole process, one thread, imports included; memory is its highest resident set.
`--peer-python` is the interpreter of an environment with mergekit 0.1.5. Its OMP takes many
minutes: it is measured on the first N of the new tokens (its batch is 512) and its whole command is
that time, scaled to all of them, plus its whole command for mean rows. Rows are compared on the
first 128 of them, with ours picked as mergekit picks (normalise=false). The loops are compiled once
before and that is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch

FULL = {"vocab": 32000, "hidden": 1024, "files": 1200}
SMALL = {"vocab": 3000, "hidden": 128, "files": 60}
BOUND = 1 / 5
MEMORY_MB = 3000.0
NOISE = 0.3
AGREE = 128
"""Tokens whose rows are compared."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="3,000 x 128")
    parser.add_argument("--peer-python", help="interpreter of an environment with mergekit")
    parser.add_argument("--peer-tokens", type=int, default=512)
    parser.add_argument("--work", type=Path, help="folder to keep models and measurements in")
    options = parser.parse_args()
    torch.set_num_threads(1)
    size = SMALL if options.quick else FULL
    with tempfile.TemporaryDirectory() as scratch:
        home = (options.work or Path(scratch)).resolve()
        home.mkdir(parents=True, exist_ok=True)
        if not (home / "donor" / "model.safetensors").exists():
            make(home, size)
        results = measured(home, options)
    print(f"{platform.processor() or platform.machine()}, one thread, {size}")
    print(json.dumps({"bench": "transfer", "results": results}))


def make(home: Path, size: dict[str, int]) -> None:
    """Two models, `base` and `donor`."""
    places = {"base": sysconfig.get_paths()["stdlib"], "donor": str(Path(torch.__file__).parent)}
    vocabularies = {}
    for name, place in places.items():
        files = [
            p
            for p in sorted(Path(place).rglob("*.py"))
            if "site-packages" not in p.relative_to(place).parts
        ]
        train(home / name, files[:: max(1, len(files) // size["files"])], size["vocab"])
        vocabularies[name] = json.loads((home / name / "tokenizer.json").read_text())["model"][
            "vocab"
        ]
    dice = np.random.default_rng(0)
    hidden = size["hidden"]
    spectrum = np.arange(1, hidden + 1) ** -0.5
    latent: dict[str, np.ndarray] = {}
    for name, tokens in vocabularies.items():
        view = dice.standard_normal((hidden, hidden)).astype(np.float32) * spectrum[:, None]
        rows = np.empty((size["vocab"], hidden), np.float32)
        for token, number in sorted(tokens.items()):
            if token not in latent:
                latent[token] = dice.standard_normal(hidden).astype(np.float32)
            rows[number] = latent[token]
        rows = rows @ view.astype(np.float32)
        rows += NOISE * rows.std() * dice.standard_normal(rows.shape).astype(np.float32)
        save(home / name, torch.from_numpy(0.02 * rows / rows.std()))


def train(folder: Path, files: list[Path], count: int) -> None:
    """A byte-level BPE of `count` tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=count,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    inner.train_from_iterator((file.read_text("utf-8", "ignore") for file in files), trainer)
    if inner.get_vocab_size() != count:
        raise SystemExit(f"{folder.name}: {inner.get_vocab_size()} tokens, {count} wanted")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    )
    tokenizer.save_pretrained(folder)


def save(folder: Path, table: torch.Tensor) -> None:
    """A Llama of one thin layer with this table."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(table),
        hidden_size=table.shape[1],
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=8,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(table)
    model.save_pretrained(folder)


def command(home: Path, name: str, words: list[str]) -> tuple[float, float, str]:
    """CPU seconds, peak MB and output of one process; read again when it was measured before."""
    kept = home / f"measured-{name}.json"
    if kept.exists():
        seconds, peak, out = json.loads(kept.read_text())
        return seconds, peak, out
    reader = (
        "import json,resource,subprocess,sys;"
        "done=subprocess.run(sys.argv[1:],stdout=subprocess.PIPE,stderr=subprocess.PIPE,text=True);"
        "used=resource.getrusage(resource.RUSAGE_CHILDREN);"
        "print(json.dumps([used.ru_utime+used.ru_stime,used.ru_maxrss/1024,done.returncode,"
        "done.stdout[-20000:],done.stderr[-3000:]]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", reader, *words], stdout=subprocess.PIPE, text=True, check=True
    )
    seconds, peak, code, out, error = json.loads(done.stdout)
    if code:
        raise SystemExit(f"{' '.join(words[:4])}: {error}")
    kept.write_text(json.dumps([seconds, peak, out]))
    return seconds, peak, out


def ours(home: Path, method: str, out: str, **settings: object) -> tuple[float, float]:
    """Our whole command."""
    words = [f"{key}={value}" for key, value in settings.items()]
    if not (home / f"measured-{out}.json").exists():
        shutil.rmtree(home / out, ignore_errors=True)  # or it would go on where it stopped
    models = [f"base={home / 'base'}", f"tokenizer={home / 'donor'}", f"out={home / out}"]
    seconds, peak, _ = command(
        home, out, [sys.executable, "-m", "deltaloom", "transfer", method, *models, *words]
    )
    return seconds, peak


def measured(home: Path, options: argparse.Namespace) -> list[dict]:
    """All rows of the result."""
    warm(home)
    spent = {method: ours(home, method, f"our-{method}") for method in ("omp", "fvt")}
    notes = json.loads((home / "our-omp" / "run.json").read_text())["notes"]
    print(
        f"{notes['shared_tokens']:,} tokens shared, {notes['new_tokens']:,} new, "
        f"{notes['anchors']:,} atoms"
    )
    results = []
    for method, (seconds, peak) in spent.items():
        print(f"{method}: ours {seconds:.1f} CPU s, {peak:.0f} MB")
        results.append(row(f"{method}, ours", seconds, None, "CPU s"))
    results.append(row("omp, our peak memory", spent["omp"][1], MEMORY_MB, "MB"))
    if options.peer_python:
        results += beside_the_peer(home, options, spent, notes["new_tokens"])
    return results


def warm(home: Path) -> None:
    """Compile the loops, on a few vectors."""
    from deltaloom.transfer._pursuit import Pursuit

    Pursuit(torch.randn(40, 8), 4).sums(torch.randn(3, 8))


def beside_the_peer(
    home: Path, options: argparse.Namespace, spent: dict[str, tuple[float, float]], new: int
) -> list[dict]:
    """Ratios and agreement; of a small case most time is the start of a process."""
    bound = None if options.quick else BOUND
    script = str(Path(options.peer_python).parent / "mergekit-tokensurgeon")
    where = [str(home / "base"), str(home / "donor")]
    run = {
        name: command(
            home,
            f"peer-{name}",
            [options.peer_python, script, *where, str(home / f"peer-{name}"), "-a", name],
        )
        for name in ("subword", "mean")
    }
    peer = str(Path(__file__).parent / "_transfer_peer.py")
    count = str(options.peer_tokens)
    rows = home / "rows.npy"
    _, peak, out = command(home, "peer-omp", [options.peer_python, peer, *where, count, str(rows)])
    found = json.loads(out.strip().split("\n")[-1])
    each = found["seconds"] / found["done"]
    whole = run["mean"][0] + each * found["new"]
    print(
        f"omp: mergekit {1000 * each:.1f} ms a token on {found['done']:,} of {found['new']:,} new "
        f"tokens (peak {peak:.0f} MB), {run['mean'][0]:.1f} CPU s around it: {whole:.0f} CPU s in "
        f"all; subword {run['subword'][0]:.1f} CPU s, {run['subword'][1]:.0f} MB"
    )
    gap = distance(home, found["ids"][:AGREE], torch.from_numpy(np.load(rows))[:AGREE])
    return [
        row("omp, of mergekit's CPU time", spent["omp"][0] / whole, bound, "ratio"),
        row("fvt, of mergekit's CPU time (subword)", spent["fvt"][0] / run["subword"][0], 1.0,
            "ratio"),
        row("omp, distance of rows to mergekit's (normalise=false)", gap, 1e-3,
            "relative, median"),
    ]  # fmt: skip


def distance(home: Path, numbers: list[int], theirs: torch.Tensor) -> float:
    """Median distance of our rows of some of the donor's tokens to the peer's, relative."""
    from deltaloom.core.base import Base
    from deltaloom.core.vocabulary import Vocabulary
    from deltaloom.transfer._move import Move, Side
    from deltaloom.transfer._pursuit import Pursuit
    from deltaloom.transfer.omp import weighted

    source, donor = (Side.read(Base(model=str(home / name))) for name in ("base", "donor"))
    move = Move(source, Vocabulary.read(home / "donor"), False, donor)
    mine, given = (torch.tensor(one) for one in move.anchors)
    table = donor.table(False)
    pursuit = Pursuit(table[given], 64, normalise=False)
    made = weighted(source.table(False)[mine], *pursuit.sums(table[numbers]))
    return ((made - theirs).norm(dim=1) / theirs.norm(dim=1)).median().item()


def row(name: str, value: float, bound: float | None, unit: str) -> dict:
    return {
        "name": name,
        "value": value,
        "bound": bound,
        "holds": bound is None or value <= bound,
        "unit": unit,
    }


if __name__ == "__main__":
    main()
