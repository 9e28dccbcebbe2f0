"""ATM: the loop's arithmetic against closed forms in float64, one iteration against one-shot task
arithmetic byte for byte, starts from other merges, kills, and the sentences for bad settings.
"""

import hashlib
import json
import os
import signal
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import base_in, rows_in, run_in

from deltaloom import methods, testing
from deltaloom.core.base import Base
from deltaloom.core.errors import InputError
from deltaloom.core.examples import Examples
from deltaloom.core.registry import get
from deltaloom.recipe.execute import run_step
from deltaloom.recipe.parsing import parse_step

DESCENT = '''
"""Full-batch gradient descent on least squares in float64, for tests."""

import shutil
from typing import final

import torch
from safetensors.torch import load_file, save_file

from deltaloom.core.delta import describe, load
from deltaloom.core.method import Tuner, Work


def read(data):
    numbers = [[float(x) for x in (row.prompt + row.completion).split()] for row in data]
    table = torch.tensor(numbers, dtype=torch.float64)
    return table[:, :-1], table[:, -1]


@final
class Descent(Tuner):
    """Gradient descent on |X w - y|^2 / 2n."""

    steps: int = 1
    lr: float = 0.1

    def work(self, sizes):
        return Work()

    def tune(self, base, data, run, *, evaluation=None):
        x, y = read(data)
        w = load_file(base.folder / "model.safetensors")["w"]
        for _ in range(self.steps):
            w = w - self.lr * x.T @ (x @ w - y) / len(y)
        save_file({"w": w}, run.folder / "model.safetensors")
        shutil.copyfile(base.folder / "config.json", run.folder / "config.json")
        describe(run.folder, "dense", base)
        return load(run.folder, base)
'''
MEAN = '''
"""The mean of two adapters as an adapter, for tests."""

from typing import final

from deltaloom.core.delta import load
from deltaloom.core.method import Merger, Work


@final
class Mean(Merger):
    """0.5 a + 0.5 b, factors side by side."""

    def work(self, sizes):
        return Work()

    def merge(self, base, deltas, run, *, data=()):
        first, second = deltas
        (0.5 * first + 0.5 * second).save(run.folder)
        return load(run.folder, base)
'''
WIDTH, LR = 5, 0.05


def brought(folder, monkeypatch, verb, name, code):
    """A method of another package, found by its entry point."""
    package, info = folder / name, folder / f"{name}-1.dist-info"
    package.mkdir()
    info.mkdir()
    (package / "__init__.py").write_text(code)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
    point = f"[deltaloom.{verb}]\n{name} = {name}:{name.title()}\n"
    (info / "entry_points.txt").write_text(point)
    monkeypatch.syspath_prepend(folder)
    methods.cache_clear()
    yield name
    methods.cache_clear()
    sys.modules.pop(name, None)


@pytest.fixture
def descent(tmp_path, monkeypatch):
    """A tuner in float64."""
    yield from brought(tmp_path, monkeypatch, "tune", "descent", DESCENT)


@pytest.fixture
def mean(tmp_path, monkeypatch):
    """A merger whose product is an adapter."""
    yield from brought(tmp_path, monkeypatch, "merge", "mean", MEAN)


def regression(folder, seed, rows=(40, 25), stretch=1.0):
    """A base of one tensor w (5,) float64, and the rows of two least-squares tasks."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    model = folder / "model"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    save_file({"w": draw(WIDTH)}, model / "model.safetensors")
    data, tasks = [], []
    for number, count in enumerate(rows):
        scales = 1 + stretch * torch.rand(WIDTH, generator=generator, dtype=torch.float64)
        x = draw(count, WIDTH) * scales
        y = x @ draw(WIDTH) + 0.1 * draw(count)
        path = folder / f"task{number}.jsonl"
        with open(path, "w") as file:
            for a, b in zip(x.tolist(), y.tolist(), strict=True):
                prompt = " ".join(map(repr, a)) + " "
                file.write(json.dumps({"prompt": prompt, "completion": repr(b)}) + "\n")
        data.append(Examples.read(path))
        tasks.append((x, y))
    return Base(model=str(model)), data, tasks


def atm_of(folder, base, data, **settings):
    """The merged w."""
    with run_in(folder) as run:
        get("merge", "atm").make(settings).merge(base, [], run, data=data)
    return load_file(folder / "model.safetensors")["w"]


def descend(w, tasks, steps):
    """Full-batch gradient descent on the sum of the tasks' losses."""
    for _ in range(steps):
        w = w - LR * sum(x.T @ (x @ w - y) / len(y) for x, y in tasks)
    return w


def loss(w, tasks):
    return float(sum(((x @ w - y) ** 2).mean() / 2 for x, y in tasks))


def test_one_step_an_iteration_is_multitask_gradient_descent(descent, tmp_path):
    base, data, tasks = regression(tmp_path, seed=0)
    tuning = {"lr": LR, "steps": 12}
    got = atm_of(
        tmp_path / "out",
        base,
        data,
        tuner=descent,
        tuning=tuning,
        iterations=12,
        merger="task_arithmetic",
    )
    start = load_file(base.folder / "model.safetensors")["w"]
    wanted = descend(start, tasks, 12)
    assert (got - wanted).abs().max() < 1e-12
    assert (got - start).abs().max() > 0.1


def test_steps_that_do_not_divide_are_shared_out_whole(descent, tmp_path):
    base, data, tasks = regression(tmp_path, seed=1)
    settings = {"tuner": descent, "tuning": {"lr": LR, "steps": 7}, "iterations": 3}
    got = atm_of(tmp_path / "out", base, data, **settings)
    w = load_file(base.folder / "model.safetensors")["w"]
    for steps in (2, 2, 3):
        w = sum(descend(w, [task], steps) for task in tasks) / 2
    assert (got - w).abs().max() < 1e-12


@pytest.mark.parametrize("seed", range(2))
def test_on_quadratics_atm_ends_no_worse_than_one_shot(descent, tmp_path, seed):
    # Steps enough to converge: the mean of the tasks' minima is not the minimum of the mean.
    base, data, tasks = regression(tmp_path, seed, stretch=2.0)
    settings = {"tuner": descent, "tuning": {"lr": LR, "steps": 100}}
    one, many = (
        loss(atm_of(tmp_path / f"out{k}", base, data, iterations=k, **settings), tasks)
        for k in (1, 10)
    )
    assert many < one


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def tuned(tmp_path):
    """A tiny model and the rows of two tasks."""
    base = base_in(tmp_path / "base")
    data = [str(rows_in(tmp_path / f"task{i}.jsonl", 24, 7 * i)) for i in range(2)]
    return str(base), data


def step(verb, folder, **values):
    return run_step(parse_step(verb, {"name": "step", **values}, verb), folder)


@pytest.mark.parametrize(("tuner", "dtype"), [("lora", "bfloat16"), ("full", "float32")])
def test_one_iteration_is_one_shot_task_arithmetic_byte_for_byte(tuned, tmp_path, tuner, dtype):
    base, data = tuned
    if dtype == "bfloat16":
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        tokenizer, base = AutoTokenizer.from_pretrained(base), str(tmp_path / "narrow")
        model.save_pretrained(base)
        tokenizer.save_pretrained(base)
    tuning = {"epochs": 2, "lr": 1e-2}
    folders = [str(tmp_path / f"expert{i}") for i in range(2)]
    for folder, rows in zip(folders, data, strict=True):
        step("tune", folder, method=tuner, base=base, data=rows, seed=3, **tuning)
    one = {"method": "task_arithmetic", "deltas": folders, "scale": 0.5}
    step("merge", tmp_path / "sum", base=base, seed=3, **one)
    # A sum of adapters need not be a model yet.
    step("merge", tmp_path / "one", base=base, method="passthrough", deltas=str(tmp_path / "sum"))
    atm = {"method": "atm", "data": data, "tuner": tuner, "tuning": tuning, "iterations": 1}
    step("merge", tmp_path / "atm", base=base, seed=3, **atm)
    name = "model.safetensors"
    assert digest(tmp_path / "one" / name) == digest(tmp_path / "atm" / name)
    assert digest(tmp_path / "one" / name) != digest(tmp_path / "base" / name)


def test_small_steps_are_not_rounded_away_between_iterations(tmp_path, tuned):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base, data = tuned
    narrow = tmp_path / "narrow"
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(narrow)
    AutoTokenizer.from_pretrained(base).save_pretrained(narrow)
    # Loaded in float32 both ways, the only difference is what is kept between iterations.
    wide = tmp_path / "wide"
    AutoModelForCausalLM.from_pretrained(narrow, dtype=torch.float32).save_pretrained(wide)
    AutoTokenizer.from_pretrained(base).save_pretrained(wide)
    atm = {"method": "atm", "data": data, "tuning": {"epochs": 2, "lr": 1e-3}}
    tensors = []
    for name, model in (("a", narrow), ("b", wide)):
        given = {"model": str(model), "dtype": "float32"}
        step("merge", tmp_path / name, base=given, **atm)
        tensors.append(load_file(tmp_path / name / "model.safetensors"))
    for name, value in tensors[0].items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, tensors[1][name].bfloat16()), name


def test_starts_from_another_merge(tuned, tmp_path):
    base, data = tuned
    start = str(tmp_path / "start")
    tuning = {"epochs": 1, "lr": 1e-2}
    step("tune", start, method="full", base=base, data=data[0], **tuning)
    atm = {"method": "atm", "data": data, "tuner": "full", "tuning": tuning}
    step("merge", tmp_path / "posthoc", base=base, deltas=start, **atm)
    # The same iteration by hand, over the start as the base.
    step("merge", tmp_path / "over", base=start, **atm)
    first, second = (tmp_path / name / "model.safetensors" for name in ("posthoc", "over"))
    assert digest(first) == digest(second)
    about = json.loads((tmp_path / "posthoc" / "delta.json").read_text())
    assert about["base"]["fingerprint"] == Base(model=base).fingerprint()


def test_several_deltas_are_merged_first(tuned, tmp_path):
    base, data = tuned
    starts = [str(tmp_path / f"start{i}") for i in range(2)]
    for folder, rows in zip(starts, data, strict=True):
        step("tune", folder, method="lora", base=base, data=rows, epochs=1, lr=1e-2)
    ties = {"merger": "ties", "merging": {"density": 0.5}}
    atm = {"method": "atm", "data": data, "tuning": {"epochs": 1, "lr": 1e-2}, **ties}
    step("merge", tmp_path / "a", base=base, deltas=starts, **atm)
    step("merge", tmp_path / "merged", method="ties", base=base, deltas=starts, density=0.5)
    step("merge", tmp_path / "b", base=base, deltas=str(tmp_path / "merged"), **atm)
    name = "model.safetensors"
    assert digest(tmp_path / "a" / name) == digest(tmp_path / "b" / name)


def test_a_merger_may_give_an_adapter(tuned, tmp_path, mean):
    base, data = tuned
    atm = {"method": "atm", "base": base, "data": data, "tuning": {"epochs": 2, "lr": 1e-2}}
    step("merge", tmp_path / "model", **atm)
    step("merge", tmp_path / "adapter", **atm, merger=mean)
    first, second = (
        load_file(tmp_path / name / "model.safetensors") for name in ("model", "adapter")
    )
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=1e-4, atol=1e-5)


def test_killed_without_deltas_it_goes_on_to_the_same_bytes(tuned, tmp_path):
    base, data = tuned
    tuning = {"epochs": 2, "lr": 1e-2, "r": 2}
    atm = {"method": "atm", "base": base, "data": data, "tuning": tuning}
    began = time.monotonic()
    step("merge", tmp_path / "whole", **atm)
    seconds = time.monotonic() - began
    for part in (0.4, 0.8):
        folder = tmp_path / f"killed{part}"
        child = os.fork()
        if child == 0:
            try:
                step("merge", folder, **atm)
            finally:
                os._exit(0)
        time.sleep(part * seconds)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        record = step("merge", folder, **atm)
        assert testing.product(folder) == testing.product(tmp_path / "whole")
        whole = json.loads((tmp_path / "whole" / "run.json").read_text())
        for key in ("backward_tokens", "flops"):
            assert record["cost"][key] == whole["cost"][key], key


def test_ledger_log_and_disk(tuned, tmp_path):
    base, data = tuned
    tuning = {"epochs": 2, "lr": 1e-2}
    for method, folder in (("lora", "apart"), ("atm", "atm")):
        if method == "lora":
            spent = sum(
                step("tune", tmp_path / f"{folder}{i}", method=method, base=base, data=rows,
                     **tuning)["cost"]["backward_tokens"]
                for i, rows in enumerate(data)
            )  # fmt: skip
        else:
            step("merge", tmp_path / folder, method=method, base=base, data=data, tuning=tuning)
    record = json.loads((tmp_path / "atm" / "run.json").read_text())
    assert record["cost"]["backward_tokens"] == spent
    lines = (tmp_path / "atm" / "metrics.jsonl").read_text().splitlines()
    found = [(one["step"], one["task"]) for one in map(json.loads, lines)]
    assert found == [(k, f"task{i}") for k in (1, 2) for i in range(2)]
    assert not (tmp_path / "atm" / ".work").exists()


def test_a_plan_tells_the_tuners_tokens(tuned):
    from deltaloom.recipe.plan import plan

    base, data = tuned
    atm = {"method": "atm", "data": data, "tuning": {"epochs": 2}}
    tune = {"method": "lora", "data": data, "epochs": 2}
    (merging,), (tuning,) = (
        plan({"base": base, "steps": [{verb: step}]})
        for verb, step in (("merge", atm), ("tune", tune))
    )
    assert merging["tokens"] == tuning["tokens"]
    assert merging["disk_bytes"] > tuning["disk_bytes"]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"tuner": "lorra"}, "did you mean 'lora'"),
        ({"tuning": {"lrr": 1}}, "tune lora: unknown key 'lrr'; did you mean 'lr'"),
        ({"merger": "tiess"}, "did you mean 'ties'"),
        ({"merging": {"density": 2}}, "merge average: density = 2"),
        ({"merger": "atm"}, "does not merge deltas"),
        ({"iterations": 0}, "iterations = 0"),
    ],
)
def test_settings_are_checked_before_anything_runs(settings, sentence):
    with pytest.raises(InputError, match=sentence):
        get("merge", "atm").make(settings)


def test_fewer_steps_than_iterations_and_no_data_are_refused(descent, tmp_path):
    few = {"tuner": descent, "tuning": {"steps": 2}, "iterations": 3}
    with pytest.raises(InputError, match="less than one for 3 iterations"):
        get("merge", "atm").make(few)
    base, _, _ = regression(tmp_path, seed=0)
    with pytest.raises(InputError, match="one set of rows per task"):
        atm_of(tmp_path / "out", base, [], tuner=descent)


def test_iterations_are_an_epoch_at_most_or_ten(descent):
    made = get("merge", "atm").make({"tuning": {"epochs": 2.5}})
    assert [tuner.epochs for tuner in made._tuners()] == pytest.approx([2.5 / 3] * 3)
    made = get("merge", "atm").make({"tuner": descent, "tuning": {"steps": 25}})
    assert [tuner.steps for tuner in made._tuners()] == [2, 3] * 5
