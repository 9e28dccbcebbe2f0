"""The shards of `measure kernel`: the same bytes whoever makes them, and when."""

import functools
import os
import signal

import numpy as np
import pytest
from test_kernel import asked

from deltaloom.core.origin import Origin
from deltaloom.core.run import Run, Workers
from deltaloom.engine.ntk import gram
from deltaloom.measure import _kernel_shards as shards
from deltaloom.measure import _kernel_study
from deltaloom.measure._differentiable import differentiable
from deltaloom.measure._kernel_shards import Asking, tangent_kernels
from deltaloom.measure._kernel_study import Study
from deltaloom.measure._label_words import LabelWords, questions
from deltaloom.measure.kernel import Kernel


def measured(base, rows, home, workers, settings):
    """Estimate, notes, and the kernels themselves, by so many workers."""
    kept = []
    init = _kernel_study.Study.__init__

    def remembered(self, *args):
        kept.append(self)
        init(self, *args)

    with (
        pytest.MonkeyPatch.context() as patch,
        Run.open(home, {"steps": []}, {}, seed=0) as run,
    ):
        patch.setattr(_kernel_study.Study, "__init__", remembered)
        run.workers, run.origin = workers, Origin(base)
        found = Kernel(**settings).measure(*run.origin.load(), rows, run)
    (study,) = kept
    grams = {kind: gram.tobytes() for kind, gram in study.grams.items()}
    return found.to_json(), run.record["notes"], grams


SHARED = {"kernels": ["sgd", "asymmetric"], "folds": 3}
SLABS = 4.7e-4
"""GiB that cut the gradients by all parameters into three slabs."""


@pytest.mark.parametrize(
    ("settings", "counts"),
    [({}, (0, 1, 2)), ({"parameters": "lora", "r": 2, "memory_gib": 5e-5}, (0, 1))],
    ids=["all", "lora in slabs"],
)
def test_any_number_of_workers_gives_the_same_bytes(
    settings, counts, base, rows, tmp_path, monkeypatch
):
    monkeypatch.setattr(shards, "FEWEST", 1)
    data = rows(*asked(n=21))
    found = [
        measured(base, data, tmp_path / f"by-{count}", Workers(count), SHARED | settings)
        for count in counts
    ]
    assert all(one == found[0] for one in found)


def test_ray_gives_the_same_bytes(base, rows, tmp_path):
    pytest.importorskip("ray")
    data = rows(*asked(n=21))
    found = [
        measured(base, data, tmp_path / f"by-{k}", workers, SHARED)
        for k, workers in enumerate((Workers(), Workers(2, "local")))
    ]
    assert found[0] == found[1]


def test_slabs_change_rounding_only(tiny, rows, run):
    data = rows(*asked(n=21))
    grams = []
    with differentiable(tiny.model, "all", 8, 0) as ready:
        words = LabelWords(ready.model, 3, 0)
        study = Study(words, questions(data, tiny.tokenizer, "", 64), 0, ready.names)
        for memory in (2**30, 500_000):
            how = Asking(None, "all", 8, 0)
            before = words.forward_tokens
            grams.append(tangent_kernels(study, ["sgd"], how, memory, run)["sgd"])
            passes = (words.forward_tokens - before) / sum(len(one.ids) for one in study.asked)
            assert (passes == 1) == (memory == 2**30)
        own = [batch for _, batch in words.batches(study.asked)]
        order = np.argsort([i for numbers, _ in words.batches(study.asked) for i in numbers])
        held = gram(ready.model, own, own, words, names=ready.names)[order][:, :, order]
    np.testing.assert_allclose(grams[0], grams[1], rtol=0, atol=1e-6 * np.abs(held).max())
    np.testing.assert_allclose(grams[0], held, rtol=0, atol=1e-6 * np.abs(held).max())


def test_workers_that_cannot_load_the_model_are_not_asked(tiny, rows, run):
    data = rows(*asked(n=12))
    wanted = Kernel(folds=3).measure(tiny.model, tiny.tokenizer, data, run.part("a"))
    run.workers = Workers(2)
    assert Kernel(folds=3).measure(tiny.model, tiny.tokenizer, data, run.part("b")) == wanted


def test_a_killed_worker_costs_its_shard_only(base, rows, tmp_path, monkeypatch):
    """The first to do the third shard of each map dies over it."""
    data = rows(*asked(n=21))
    wanted = measured(base, data, tmp_path / "whole", Workers(), SHARED)
    (tmp_path / "sitecustomize.py").write_text(DYING.replace("MARKS", str(tmp_path)))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    found = measured(base, data, tmp_path / "killed", Workers(1), SHARED)
    for job, shards_of in (("Gradients", 7), ("Tiles", 28)):
        begun = [path.name for path in tmp_path.glob(f"{job}-*")]
        assert len(begun) == shards_of + 1  # every shard once, the fatal one twice
        assert len([name for name in begun if name.endswith("again")]) == 1
    assert found == wanted


DYING = """
import os, signal, sys

def dying(cls, method, fatal):
    do = getattr(cls, method)

    def called(self, *args):
        mark = f"MARKS/{cls.__name__}-{str(args[-1]).replace(' ', '')}"
        again = os.path.exists(mark)
        open(mark + "-again" * again, "x").close()
        if args[-1] == fatal and not again:
            os.kill(os.getpid(), signal.SIGKILL)
        return do(self, *args)

    setattr(cls, method, called)

class Finder:
    def find_spec(self, name, path, target=None):
        if name != "deltaloom.measure._kernel_shards":
            return None
        sys.meta_path.remove(self)
        import importlib.util
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            dying(module.Gradients, "_shard", 2)
            dying(module.Tiles, "_do", (0, 2))

        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Finder())
"""


@pytest.mark.parametrize(("count", "points"), [(0, ("rows", "sum", "rows")), (1, ("sum",))])
def test_killed_and_run_again_the_same_comes_out(count, points, base, rows, tmp_path, monkeypatch):
    """kill -9 after a map of gradients, or while tiles are added up."""
    data = rows(*asked(n=21))
    settings = SHARED | {"memory_gib": SLABS}
    wanted = measured(base, data, tmp_path / "whole", Workers(), settings)
    out = tmp_path / "killed"
    for point in points:
        child = os.fork()
        if child == 0:
            _dying_after({"rows": "fill", "sum": "add_tile"}[point])
            try:
                measured(base, data, out, Workers(count), settings)
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WTERMSIG(status) == signal.SIGKILL
    there = {path: path.read_bytes() for path in out.glob(".work/**/??-??.safetensors")}
    assert len(there) >= 28
    made = []
    do = shards.Tiles._do
    monkeypatch.setattr(shards.Tiles, "_do", lambda job, pair: (made.append(pair), do(job, pair)))
    assert measured(base, data, out, Workers(), settings) == wanted
    assert len(made) == 3 * 28 - len(there)
    assert all(path.read_bytes() == data for path, data in there.items())


def _dying_after(name):
    do = getattr(shards, name)

    @functools.wraps(do)
    def then_dead(*args):
        do(*args)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(shards, name, then_dead)


def test_gradients_are_gone_when_their_tiles_are_there(base, rows, tmp_path):
    out = tmp_path / "out"
    measured(base, rows(*asked(n=21)), out, Workers(), SHARED)
    assert len([*out.glob(".work/**/??-??.safetensors")]) == 28
    assert not [*out.glob(".work/**/rows")]
