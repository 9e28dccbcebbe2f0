"""Maps over workers: every shard once, deaths survived, errors as they were."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest

from deltaloom.core.errors import InputError, WorkError
from deltaloom.core.features import Features
from deltaloom.core.run import Run, Workers
from deltaloom.engine import shards
from deltaloom.engine.shards import Job, fill, run_drawn, run_shards

CREWS = [Workers(), Workers(1), Workers(3)]


class Squares(Job):
    """Writes the square of each item into a file, and says who did."""

    def __init__(self, folder, dies=(), fails=()):
        self.folder, self.dies, self.fails = folder, dies, fails

    def open(self):
        (self.folder / f"opened-{os.getpid()}").touch()
        return self.do

    def do(self, item):
        if item in self.fails:
            raise InputError(f"no square of {item}")
        if item in self.dies:
            mark = self.folder / f"died-{item}-{len(list(self.folder.glob(f'died-{item}-*')))}"
            if self.dies[item] > int(mark.name.rpartition("-")[2]):
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
        (self.folder / f"{item}.txt").write_text(str(item**2))
        return os.getpid()


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)


def run(job, items, crew):
    found = {}
    run_shards(job, items, crew, lambda item, value: found.setdefault(item, value))
    return found


class Priced(Job):
    """Fills shards of a store, each for ten tokens, and is killed at one of them."""

    def __init__(self, store, killed=None):
        self.store, self.killed = store, killed

    def open(self):
        return self.do

    def do(self, number):
        if number == self.killed:
            raise KeyboardInterrupt
        self.store.write_shard(number, np.ones((2, 1), np.float32))
        return {"forward_tokens": 10.0}


def test_what_finished_shards_cost_is_known_after_a_kill(tmp_path):
    ids = [str(i) for i in range(6)]
    store = Features.create(tmp_path / "s", ids, 1, about={"what": "gradients"}, shard_rows=2)
    run = Run.open(tmp_path / "run", {"steps": []}, {})
    with pytest.raises(KeyboardInterrupt):
        fill(store, Priced(store, killed=2), run)
    # As the disk has it: a process that is killed writes no more.
    assert Run.read(run.home)["cost"]["forward_tokens"] == 20


@pytest.mark.parametrize("crew", CREWS, ids=["here", "one", "three"])
def test_every_shard_is_done_once(tmp_path, crew):
    found = run(Squares(tmp_path), range(7), crew)
    assert set(found) == set(range(7))
    assert {p.stem: p.read_text() for p in tmp_path.glob("*.txt")} == {
        str(i): str(i * i) for i in range(7)
    }
    workers = set(found.values())
    assert len(list(tmp_path.glob("opened-*"))) == max(1, crew.count)
    assert (os.getpid() in workers) == (crew.count == 0)


def test_a_killed_worker_costs_its_shard_only(tmp_path):
    found = run(Squares(tmp_path, dies={3: 1, 5: 2}), range(8), Workers(2))
    assert set(found) == set(range(8))
    assert len(list(tmp_path.glob("*.txt"))) == 8
    # The last deaths may leave their shard to a worker that has nothing else to do.
    assert 3 <= len(list(tmp_path.glob("opened-*"))) <= 2 + 3


def test_a_shard_that_kills_its_workers_ends_the_work(tmp_path):
    with pytest.raises(WorkError, match=r"shard 2: 3 workers died over it \(exit status -9\)"):
        run(Squares(tmp_path, dies={2: 99}), range(4), Workers(2))


def test_items_may_wait_for_others_and_one_may_be_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "TRIES", 1)
    found, lost, drawn = {}, {}, []

    def draw():
        """The next number, once half of it is done or lost."""
        number = len(drawn) + 1
        if number > 7 or (number > 1 and number // 2 not in found.keys() | lost.keys()):
            return None
        drawn.append(number)
        return number

    job = Squares(tmp_path, dies={2: 99})
    run_drawn(job, draw, 7, Workers(2), found.setdefault, lost.setdefault)
    assert drawn == list(range(1, 8))
    assert set(found) == {1, 3, 4, 5, 6, 7}
    assert lost == {2: "1 workers died over it (exit status -9)"}


@pytest.mark.parametrize("crew", CREWS, ids=["here", "one", "three"])
def test_errors_arrive_as_they_were(tmp_path, crew):
    with pytest.raises(InputError, match="no square of 4"):
        run(Squares(tmp_path, fails=(4,)), range(6), crew)


def test_other_errors_bring_the_workers_stack(tmp_path):
    with pytest.raises(RuntimeError, match="unsupported operand"):
        run(Squares(tmp_path), ["text"], Workers(1))


def test_no_items_start_nobody(tmp_path):
    assert run(Squares(tmp_path), [], Workers(2)) == {}
    assert not list(tmp_path.iterdir())


def test_ray_gives_the_same(tmp_path):
    ray = pytest.importorskip("ray")
    found = run(Squares(tmp_path, dies={1: 1}), range(4), Workers(2, "local"))
    assert set(found) == set(range(4))
    assert len(list(tmp_path.glob("*.txt"))) == 4
    assert not ray.is_initialized()


def test_a_cluster_without_ray_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(InputError, match=r'pip install "deltaloom\[ray\]"'):
        run(Squares(tmp_path), range(2), Workers(1, "local"))
