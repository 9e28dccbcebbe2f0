"""Run: one finished or resumable piece of work, told whole by the folder it lives in.

`run.json` is the truth (status, resolved recipe, input hashes, seed, versions, cost ledger,
outputs, estimates), `recipe.yaml` replays it, `metrics.jsonl` has one line per logged step.
Scratch that makes the work resumable lives in `.work/` and goes when the run is done.
"""

from __future__ import annotations

import contextlib
import copy
import fcntl
import json
import os
import resource
import shutil
import sys
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from deltaloom.core.atomic import write_json, write_text
from deltaloom.core.errors import InputError
from deltaloom.core.spec import canonical, first_difference

if TYPE_CHECKING:
    from deltaloom.core.origin import Origin

SCHEMA = 1
PACKAGES = ("deltaloom", "torch", "transformers", "peft", "accelerate", "datasets")
COUNTERS = (
    *("wall_seconds", "cpu_seconds", "forward_tokens", "backward_tokens", "flops"),
    *("endpoint_calls", "endpoint_tokens_in", "endpoint_tokens_out"),
)
PEAKS = ("peak_rss_bytes", "peak_device_bytes")
RECORD = ("recipe", "inputs", "seed", "cost", "notes", "results")
"""What every record has beside schema and status."""
OWN = ("run.json", "recipe.yaml", "metrics.jsonl", ".lock", ".run.json.part")
"""Files that a run itself makes in its folder."""


@dataclass(frozen=True)
class Workers:
    """Who does a run's maps; no part of what the run is, as it changes none of its results."""

    count: int = 0
    """Worker processes, each with one thread; 0 works in this process."""
    cluster: str | None = None
    """Address of a Ray cluster, or `local` to start one here."""

    @property
    def here(self) -> bool:
        """Whether this process works itself."""
        return not self.count and self.cluster is None


class Run:
    """A folder being worked in. Use as a context manager: leaving it records how it ended."""

    def __init__(self, folder: Path, record: dict[str, Any], lock: int) -> None:
        self.home = folder
        """Where `run.json` and the scratch are."""
        self.folder = folder
        """Where outputs go; `part` gives views that write to a folder inside."""
        self.workers = Workers()
        self.origin: Origin | None = None
        """What a measured model was loaded from, for workers; None if that is not known."""
        self.until: float | None = None
        """Share of its optimizer steps after which a training pauses; None trains to the end."""
        self.record = record
        self._lock = lock
        # Shared with the views that `part` gives, so that no second is counted twice.
        self._clock = [time.perf_counter(), _cpu_seconds()]
        self._made = (False, False)

    @classmethod
    def open(
        cls,
        folder: str | Path,
        recipe: dict[str, Any],
        inputs: dict[str, str],
        seed: int = 0,
        *,
        replay: dict[str, Any] | None = None,
        editable: bool = False,
    ) -> Self:
        """Start a run in `folder`, or take up the one that is there.

        `recipe` is the resolved recipe, `inputs` maps input names to content hashes; together
        they say what this run is. `replay` goes to `recipe.yaml` where it must say more than
        `recipe`, as the folders of the earlier steps that a step names. Raises InputError when
        another process works in the folder, or when the folder holds the run of another recipe
        or of other inputs; with `editable` the recipe may have changed (a recipe's steps are
        runs of their own and check themselves).
        """
        folder = Path(folder)
        fresh = not folder.exists()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = _take_lock(folder)
        except OSError as error:
            raise InputError(
                f"{folder}: cannot be made a run folder ({error.strerror}); choose another out="
            ) from None
        try:
            record = _matching_record(folder, recipe, inputs, seed, editable)
            new = record is None
            if record is None:
                if any(p.name not in (".lock", ".run.json.part") for p in folder.iterdir()):
                    (folder / ".lock").unlink()
                    raise InputError(f"{folder} is not empty and holds no run; choose another out=")
                record = _new_record(recipe, inputs, seed)
            run = cls(folder, record, lock)
            run._made = (new, fresh)
            if run.done:  # it may have been killed before it removed its scratch
                shutil.rmtree(folder / ".work", ignore_errors=True)
            else:
                run.record["status"] = "running"
                run.save()
                write_text(folder / "recipe.yaml", _yaml(replay or recipe))
        except BaseException:
            os.close(lock)
            raise
        return run

    @classmethod
    def apart(cls, folder: Path, seed: int) -> Self:
        """The run in `folder` as a worker has it, with empty notes and an empty ledger to be sent
        back; it has no lock and must not be saved.
        """
        cost = dict.fromkeys((*COUNTERS, *PEAKS), 0.0)
        return cls(folder, {"seed": seed, "cost": cost, "notes": {}}, -1)

    @classmethod
    def read(cls, folder: str | Path) -> dict[str, Any]:
        """The record of the run in `folder`; raises InputError when there is none."""
        path = Path(folder) / "run.json"
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise InputError(f"{folder} holds no run (no run.json in it)") from None
        except json.JSONDecodeError as error:
            raise InputError(f"{path} line {error.lineno}: not JSON ({error.msg})") from None
        schema = record.get("schema") if isinstance(record, dict) else None
        if schema != SCHEMA:
            raise InputError(
                f"{path}: schema {schema!r}, this version reads {SCHEMA}; choose another folder"
            )
        absent = [key for key in ("status", *RECORD) if key not in record]
        if absent:
            raise InputError(f"{path}: {absent[0]!r} is missing; remove the folder and run again")
        return record

    @classmethod
    def refuse_other(cls, folder: Path, recipe: dict[str, Any]) -> None:
        """Raise InputError when `folder` holds the run of another recipe; changes nothing."""
        if (folder / "run.json").exists():
            _refuse_other(folder, "recipe", cls.read(folder)["recipe"], recipe)

    @property
    def done(self) -> bool:
        """Whether the work is finished and its outputs are in place."""
        return self.record["status"] == "done"

    @property
    def seed(self) -> int:
        """The seed of every random choice in this run."""
        return self.record["seed"]

    @property
    def model_workers(self) -> Workers:
        """Who does a measured model's passes: `workers`, if they can load it."""
        return Workers() if self.origin is None else self.workers

    @property
    def work(self) -> Path:
        """Scratch for checkpoints and shards; survives interruption, goes when the run is done."""
        path = self.home / ".work"
        path.mkdir(exist_ok=True)
        return path

    def part(self, name: str) -> Run:
        """This run with its outputs in the folder `name` inside; it shares ledger and log."""
        inside = Path(name)
        if not inside.parts or inside.is_absolute() or ".." in inside.parts:
            raise InputError(f"{name!r} cannot name a folder inside {self.folder}")
        view = copy.copy(self)
        view.folder = self.folder / name
        view.folder.mkdir(parents=True, exist_ok=True)
        return view

    def scratch(self, name: str) -> Run:
        """As `part`, in the scratch: for work whose files are no product of this run."""
        view = copy.copy(self)
        view.folder = self.work / name
        view.folder.mkdir(parents=True, exist_ok=True)
        return view

    def nested(self, name: str) -> Run:
        """As `scratch`, with a log and scratch of its own there: for one trial of many."""
        view = self.scratch(name)
        view.home = view.folder
        return view

    def log(self, **metrics: Any) -> None:
        """Append one line to `metrics.jsonl`."""
        with open(self.home / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(canonical(metrics) + "\n")

    def rewind(self, step: int) -> None:
        """Forget the metrics logged after optimizer step `step`: they will be logged again."""
        path = self.home / "metrics.jsonl"
        if path.exists():
            lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
            kept = [line for line in lines if _is_up_to(line, step)]
            write_text(path, "".join(line + "\n" for line in kept))

    def spend(self, **amounts: float) -> None:
        """Add to the cost ledger: counters are summed, peaks are kept at their largest.

        A counter that the ledger of an older run lacks is begun.
        """
        cost = self.record["cost"]
        for key, amount in amounts.items():
            before = cost.get(key, 0.0)
            cost[key] = max(before, amount) if key in PEAKS else before + amount

    def save(self) -> None:
        """Write the record, with the time spent since the last save in the ledger."""
        wall, cpu = time.perf_counter(), _cpu_seconds()
        self.spend(wall_seconds=wall - self._clock[0], cpu_seconds=cpu - self._clock[1])
        self.spend(peak_rss_bytes=_peak_rss_bytes())
        self._clock[:] = wall, cpu
        write_json(self.home / "run.json", self.record)

    def publish(self, folder: Path) -> None:
        """Move the files of a finished scratch folder to where users look for them."""
        for path in sorted(folder.iterdir()):
            goal = self.folder / path.name
            if goal.is_dir():
                shutil.rmtree(goal)
            os.replace(path, goal)

    def note(self, **facts: Any) -> None:
        """Put facts worth reading later (counts, choices made) into the record."""
        self.record["notes"].update(facts)

    def finish(self, **results: Any) -> None:
        """Record the results, remove the scratch and mark the run done."""
        self.record["results"].update(results)
        self.record["status"] = "done"
        self.save()
        shutil.rmtree(self.home / ".work", ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: Any, trace: Any) -> None:
        try:
            if kind is None or self.done:
                return
            if issubclass(kind, InputError) and self._made[0] and _is_bare(self.home):
                _remove_bare(self.home, and_folder=self._made[1])
                return
            interrupted = issubclass(kind, KeyboardInterrupt)
            self.record["status"] = "interrupted" if interrupted else "failed"
            self.record["error"] = str(error)
            self.save()
        finally:
            os.close(self._lock)


def _take_lock(folder: Path) -> int:
    path = folder / ".lock"
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise InputError(
                f"{folder} is in use by another run; wait for it or choose another out="
            ) from None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock), path.stat()):
                return lock
        # A run that ended in bad input removed the file between the two calls.
        os.close(lock)


def _matching_record(
    folder: Path, recipe: dict[str, Any], inputs: dict[str, str], seed: int, editable: bool
) -> dict[str, Any] | None:
    if not (folder / "run.json").exists():
        return None
    record = Run.read(folder)
    ours = {"recipe": recipe, "inputs": inputs, "seed": seed}
    if editable and canonical(record["recipe"]) != canonical(recipe):
        record.update(ours, status="running")
    for part, mine in ours.items():
        _refuse_other(folder, part, record[part], mine)
    record["status"] = record["status"] if record["status"] == "done" else "running"
    record.pop("error", None)
    return record


def _refuse_other(folder: Path, part: str, theirs: Any, mine: Any) -> None:
    if canonical(theirs) != canonical(mine):
        where = first_difference(theirs, mine, part)
        raise InputError(
            f"{folder} holds another run (different {where}); "
            "choose another out= or remove that folder"
        )


def _new_record(recipe: dict[str, Any], inputs: dict[str, str], seed: int) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "status": "running",
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "recipe": recipe,
        "inputs": inputs,
        "seed": seed,
        "versions": versions(),
        "cost": dict.fromkeys((*COUNTERS, *PEAKS), 0.0),
        "notes": {},
        "results": {},
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the result."""
    found = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def _is_up_to(line: str, step: int) -> bool:
    # A line that an interruption cut short is no object and goes too.
    try:
        return json.loads(line).get("step", 0) <= step
    except (ValueError, AttributeError):
        return False


def _is_bare(folder: Path) -> bool:
    """Whether nothing but the run's own record is in `folder`: no work, and no user's files."""
    files = (path for path in folder.rglob("*") if not path.is_dir() or path.is_symlink())
    return all(path.parent == folder and path.name in OWN for path in files)


def _remove_bare(folder: Path, *, and_folder: bool) -> None:
    # Bad input must leave nothing behind, but never remove what a user put there.
    for name in OWN:
        (folder / name).unlink(missing_ok=True)
    for path in sorted((p for p in folder.rglob("*") if p.is_dir()), reverse=True):
        path.rmdir()
    if and_folder:
        folder.rmdir()


def _cpu_seconds() -> float:
    own, children = (
        resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def _peak_rss_bytes() -> float:
    # Linux gives KiB, macOS bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def _yaml(value: Any) -> str:
    import yaml

    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True)
