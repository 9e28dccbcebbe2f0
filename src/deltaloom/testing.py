"""The conformance suite: what every method must hold, here or in another package.

    import pytest
    from deltaloom import testing

    @pytest.mark.parametrize("check", testing.CHECKS, ids=lambda check: check.__name__)
    def test_my_method(check, tmp_path):
        check(testing.entry("select", "mine"), tmp_path)

Each check takes a registry entry and an empty folder, and raises AssertionError saying what does
not hold. The runs are real: a tiny untrained model and the lab's data, on the CPU.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import os
import shutil
import signal
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from deltaloom.core.registry import Entry, get
from deltaloom.core.spec import explain

PARTS = ("Paper:", "Differs:", "Not covered:")
KILLS = (0.25, 0.5, 0.75)
"""Parts of an undisturbed run's time after which the run is killed."""
VOLATILE = {"run.json", ".lock", "study.journal"}
"""Files that tell times; all others must come out the same byte for byte."""


def entry(verb: str, name: str) -> Entry:
    """The registry entry of a method on disk or from an entry point."""
    return get(verb, name)


def one_final_class(method: Entry, folder: Path) -> None:
    """The file defines one method class, marked final, frozen, refusing unknown keys."""
    cls = method.load()
    assert getattr(cls, "__final__", False), f"{cls.__name__} is not marked @typing.final"
    assert cls.model_config.get("frozen"), f"{cls.__name__} is not frozen"
    assert cls.model_config.get("extra") == "forbid", f"{cls.__name__} accepts unknown keys"


def documented(method: Entry, folder: Path) -> None:
    """The module's docstring has its parts, and every setting says what it is."""
    spec = importlib.util.find_spec(method.module)
    assert spec is not None
    assert spec.origin is not None
    doc = ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""
    missing = [part for part in PARTS if part not in doc]
    assert not missing, f"{method.module}: the docstring lacks {missing}"
    made = method.load()
    bare = [name for name in made.model_fields if not explain(made, name)]
    assert not bare, f"{method.name}: settings without a docstring: {bare}"


def yaml_round_trip(method: Entry, folder: Path) -> None:
    """Made without arguments; its settings survive YAML."""
    made = method.make()
    text = yaml.safe_dump(made.model_dump(mode="json"))
    again = type(made).parse(yaml.safe_load(text), method.name)
    assert again == made, f"{method.name}: YAML gives back other settings"


def plans(method: Entry, folder: Path) -> None:
    """It can say what it will cost before it runs."""
    from deltaloom.core.method import Sizes, Work

    sizes = Sizes(
        rows=100,
        row_tokens=10.0,
        target_rows=5,
        matmul_parameters=1000,
        parameters=1200,
        linear_sides=100,
        weight_bytes=4800,
        deltas=2,
    )
    work = method.make().work(sizes)
    assert isinstance(work, Work)
    assert work.flops(1000) >= 0


def same_seed_same_bytes(method: Entry, folder: Path) -> None:
    """Run twice on a tiny model, the same bytes come out."""
    first, second = folder / "first", folder / "second"
    run(method, first)
    run(method, second)
    assert product(first), f"{method.name} left no product"
    _assert_same(product(first), product(second), "a second run with the same seed")


def killed_and_resumed(method: Entry, folder: Path) -> None:
    """Killed at several times and run again, the same bytes come out."""
    start = time.monotonic()
    run(method, folder / "whole")
    seconds = time.monotonic() - start
    for part in KILLS:
        out = folder / f"killed-{part}"
        _run_and_kill(method, out, seconds * part)
        run(method, out)
        _assert_same(product(folder / "whole"), product(out), f"killed at {part:.0%} and resumed")


CHECKS: tuple[Callable[[Entry, Path], None], ...] = (
    one_final_class,
    documented,
    yaml_round_trip,
    plans,
    same_seed_same_bytes,
    killed_and_resumed,
)
"""Everything a method must hold."""


def run(method: Entry, out: Path, **settings: Any) -> None:
    """Run a method once, with its default settings, on the tiny inputs of its verb."""
    from deltaloom.recipe.execute import run_step
    from deltaloom.recipe.parsing import parse_step

    given = inputs(method.verb)
    cls = method.load()
    if method.verb in ("merge", "transfer"):
        looked_at = {"base", "tokenizer", *cls.needs, *cls.uses}
        given = {key: value for key, value in given.items() if key in looked_at}
    if getattr(cls, "preferences", False):
        given = {**given, "data": inputs("measure")["tasks"]}  # questions with right and wrong
    given = {key: value for key, value in given.items() if key not in cls.optional}
    values = {**given, "method": method.name, "name": "step", **cls.trial, **settings}
    run_step(parse_step(method.verb, values, method.name), out)


def product(folder: Path) -> dict[str, str]:
    """Hashes of the files that a run left, by their path inside its folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in VOLATILE
    }


@cache
def inputs(verb: str) -> dict[str, Any]:
    """Inputs of a verb: a tiny base with the lab's data; made once a process."""
    home = _home()
    base = {"base": str(home / "base")}
    if verb == "select":
        pool, target = str(home / "pool.jsonl"), str(home / "target.jsonl")
        return {**base, "pool": pool, "target": target}
    if verb in ("tune", "search"):
        return {**base, "data": str(home / "pool.jsonl")}
    if verb == "merge":
        data = [str(home / "pool.jsonl"), str(home / "target.jsonl")]
        return {**base, "deltas": [str(home / "one"), str(home / "two")], "data": data}
    if verb == "transfer":
        donor = str(home / "donor")
        return {**base, "tokenizer": donor, "donor": donor, "data": str(home / "pool.jsonl")}
    return {**base, "tasks": str(home / "test.jsonl")}


@cache
def _home() -> Path:
    import atexit
    import tempfile

    from deltaloom.lab.files import tiny_base, write_lab

    home = Path(tempfile.mkdtemp(prefix="deltaloom-testing-"))
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    lab = write_lab(home / "lab", seed=0, size="small")
    for role in ("pool", "target", "test"):
        # Any target will do: the first by name.
        key = min(key for key in lab if key.partition("-")[0] == role)
        shutil.copyfile(lab[key], home / f"{role}.jsonl")
    tiny_base(home / "base")
    _make_donor(home / "donor", home / "pool.jsonl")
    for seed, name in enumerate(("one", "two"), 1):
        shutil.copytree(home / "base", home / name)
        _disturb(home / name, seed)
    return home


def _disturb(model: Path, seed: int) -> None:
    """Turn a copy of the base into something tuned: seeded noise on every tensor."""
    import torch
    from safetensors.torch import load_file, save_file

    path = model / "model.safetensors"
    noise = torch.Generator().manual_seed(seed)
    tensors = {
        name: tensor + 0.01 * torch.randn(tensor.shape, generator=noise)
        for name, tensor in load_file(path).items()
    }
    save_file(tensors, path, metadata={"format": "pt"})


def _make_donor(folder: Path, text: Path) -> None:
    """A tiny model with a tokenizer of another kind than the base's."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=alphabet, special_tokens=["<end>"], show_progress=False
    )
    inner.train_from_iterator(text.read_text(encoding="utf-8").splitlines(), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<end>", eos_token="<end>", pad_token="<end>"
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            tie_word_embeddings=False,
        )
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _run_and_kill(method: Entry, out: Path, seconds: float) -> None:
    child = os.fork()
    if child == 0:
        try:
            run(method, out)
        finally:
            os._exit(0)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def _assert_same(wanted: dict[str, str], got: dict[str, str], what: str) -> None:
    different = sorted(name for name in wanted | got if wanted.get(name) != got.get(name))
    assert not different, f"{what}: other bytes in {different}"


__all__ = ["CHECKS", "KILLS", "entry", "inputs", "product", "run"]
