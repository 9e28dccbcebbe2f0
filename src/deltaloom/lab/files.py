"""Write the lab to a folder in ordinary formats: a model folder and JSONL files."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from deltaloom.core.errors import InputError, WorkError
from deltaloom.lab import tasks
from deltaloom.lab.world import build_world

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

SHIPPED = Path(__file__).parent / "weights" / "base.safetensors"
# Size -> rows in the pool, people in each test, questions about each.
SIZES = {"full": (5500, 60, 4), "small": (300, 30, 2)}


def write_lab(folder: str | Path, seed: int = 0, size: str = "full") -> dict[str, Path]:
    """Write the base model, pool, questions, targets, tests and the truth; returns their paths.

    The base is always the same; `seed` draws the pool and who is in the pool, the targets and the
    tests. `size` is `full` (5,500 pool rows) or `small` (300, for tests). Running it again writes
    the same bytes. `truth.jsonl` is for grading a selection, never for making one.
    """
    if size not in SIZES:
        raise InputError(f"size must be one of {', '.join(SIZES)}, not {size!r}")
    rows, tested, questions = SIZES[size]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    world = build_world()
    split = tasks.split_people(world, seed)
    pool, truth = tasks.pool_records(tasks.draw_pool(world, split.pool, rows, seed))
    asked = [row for n in tasks.TARGETS for row in tasks.questions(world, split.pool, n, seed)]
    paths = {
        "base": _write_model(folder / "base", shipped_model),
        "pool": write_jsonl(folder / "pool.jsonl", pool),
        "truth": write_jsonl(folder / "truth.jsonl", truth),
        "questions": write_jsonl(folder / "questions.jsonl", asked),
    }
    for name in tasks.TARGETS:
        target = tasks.target_records(world, split.target, name, seed)
        test = tasks.test_records(world, split.test[:tested], name, questions, seed)
        paths[f"target-{name}"] = write_jsonl(folder / f"target-{name}.jsonl", target)
        paths[f"test-{name}"] = write_jsonl(folder / f"test-{name}.jsonl", test)
    return paths


def tiny_base(folder: str | Path, seed: int = 0) -> Path:
    """Write an untrained 2-layer model (hidden 32) with the lab's tokenizer, for fast tests."""

    def build() -> "LlamaForCausalLM":
        import torch
        from transformers import LlamaForCausalLM

        from deltaloom.lab.pretrain import model_config

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return LlamaForCausalLM(model_config(hidden=32, layers=2))

    return _write_model(Path(folder), build)


def vocabulary_digest() -> str:
    """A short hash of the vocabulary; shipped weights belong to exactly one vocabulary."""
    from deltaloom.lab.tokenizer import vocabulary

    return hashlib.sha256("\n".join(vocabulary()).encode()).hexdigest()[:16]


def shipped_model(path: Path = SHIPPED) -> "LlamaForCausalLM":
    """The shipped base in float32."""
    import torch
    from safetensors import safe_open
    from transformers import LlamaForCausalLM

    from deltaloom.lab.pretrain import model_config

    with safe_open(path, "pt") as file:
        if (file.metadata() or {}).get("vocabulary") != vocabulary_digest():
            raise WorkError(
                f"{path} was trained on another vocabulary; rebuild it with "
                f"python -m deltaloom.lab.pretrain out={path.parent}"
            )
        weights = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    with torch.random.fork_rng(devices=[]):
        model = LlamaForCausalLM(model_config())
    model.load_state_dict(weights)
    return model.eval()


def _write_model(folder: Path, build: "Callable[[], LlamaForCausalLM]") -> Path:
    """Write a model folder under a temporary name, then rename."""
    from deltaloom.lab.tokenizer import build_tokenizer

    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        build().save_pretrained(scratch)
        build_tokenizer().save_pretrained(scratch)
        scratch.chmod(0o755)
        if folder.exists():
            if _same_files(scratch, folder):
                return folder
            old = scratch.with_name(scratch.name + "-old")
            folder.rename(old)
            scratch.rename(folder)
            shutil.rmtree(old)
        else:
            scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _same_files(a: Path, b: Path) -> bool:
    """Whether two folders hold the same files with the same bytes."""
    files = sorted(p.name for p in a.iterdir())
    return files == sorted(p.name for p in b.iterdir()) and all(
        (a / name).read_bytes() == (b / name).read_bytes() for name in files
    )


def write_jsonl(path: Path, records: Iterable[dict]) -> Path:
    """Write one JSON object a line, under a temporary name first."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(name)
        raise
    return path
