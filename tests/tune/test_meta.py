"""Meta-training against autograd and plain loops; what it learned, adapted in closed form."""

import json
import random

import pytest
import tiny
import torch
from torch.func import functional_call

from deltaloom.core.base import Base
from deltaloom.core.delta import load
from deltaloom.core.encoding import Encoded, encode
from deltaloom.core.errors import InputError, WorkError
from deltaloom.core.examples import Examples
from deltaloom.core.method import Evaluation
from deltaloom.core.registry import get
from deltaloom.engine import adaptation
from deltaloom.engine.adaptation import moved
from deltaloom.tune._meta import STATE, Drawn, Learner, MetaSettings, drawn
from deltaloom.tune.kernel import Kernel
from deltaloom.tune.lora import Lora
from deltaloom.tune.meta import Meta

SMALL = {"steps": 3, "tasks": 2, "shots": 3, "queries": 2, "r": 2, "lr": 1e-2}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return Base(model=str(tiny.base_in(tmp_path_factory.mktemp("meta") / "base")), device="cpu")


def rows_of(path, **tasks):
    """Rows of each task: who lives where, in an order of its own."""
    lines = [
        {"source": task, "prompt": f"where lives {tiny.PEOPLE[i % 6]} ? " + "yes " * (i % 4),
         "completion": tiny.CITIES[(i + len(task)) % 3] + " ." * (i % 2)}
        for task, count in tasks.items() for i in range(count)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Examples.read(path)


@pytest.fixture
def data(tmp_path):
    return rows_of(tmp_path / "rows.jsonl", one=8, other=7, third=5)


def learner_of(base, disturbed=True):
    model = Lora(r=2).attach(base, 0)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    dice = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name in names if disturbed else ():  # B is zero, which hides the slopes of A
            p = model.get_parameter(name)
            p.add_(torch.randn(p.shape, generator=dice) * 0.1)
    return Learner(model, names, 0)


def settings_of(**changes):
    values = {name: getattr(Meta(**changes), name) for name in MetaSettings.__dataclass_fields__}
    return MetaSettings(**values)


def encoded(base, data):
    return encode(data, base.tokenizer(), 64)


def mean_loss(learner, parameters, rows):
    """Cross-entropy by hand, row by row: sum over responses, and their tokens."""
    total, count, each = 0.0, 0, []
    for row in rows:
        ids = torch.tensor([row.input_ids])
        logits = functional_call(learner.model, parameters, (), {"input_ids": ids}).logits[0]
        at = [k for k, known in enumerate(row.response_mask) if known]
        own = -sum(logits[k - 1].log_softmax(-1)[row.input_ids[k]] for k in at)
        total, count = total + own, count + len(at)
        each.append(own / len(at))
    return total / count, torch.stack(each)


def test_tangents_are_those_of_rows_alone_in_their_order(base, data):
    learner, rows = learner_of(base), encoded(base, data)[:5]
    at = learner.tangent(rows)
    leaves = {k: v.clone().requires_grad_() for k, v in learner.parameters.items()}
    _, each = mean_loss(learner, leaves, rows)
    wanted = [
        torch.cat([g.flatten() for g in torch.autograd.grad(one, [*leaves.values()],
                                                            retain_graph=True)])
        for one in each
    ]  # fmt: skip
    torch.testing.assert_close(at.values, each.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(at.slopes, torch.stack(wanted), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("order", ["first", "whole"])
def test_the_kernels_gradient_is_autograds_through_everything(base, data, order):
    learner, rows = learner_of(base), encoded(base, data)
    task, time = Drawn(rows[:3], rows[3:6]), 2.0
    found = learner.outer(task, settings_of(inner="kernel", order=order, time=time))
    leaves = {k: v.clone().requires_grad_() for k, v in learner.parameters.items()}
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        _, each = mean_loss(learner, leaves, task.support)
        slopes = torch.stack([
            torch.cat([g.flatten() for g in torch.autograd.grad(
                one, [*leaves.values()], create_graph=True)])
            for one in each
        ])  # fmt: skip
        kernel = slopes @ slopes.T
        t = time * 3 / kernel.trace()
        decay = torch.eye(3) - torch.matrix_exp(-t * kernel)
        by = slopes.T @ torch.linalg.solve(kernel, decay @ -each)
        by = by.detach() if order == "first" else by
        loss, _ = mean_loss(learner, moved(leaves, by), task.query)
        wanted = torch.autograd.grad(loss, [*leaves.values()])
    assert found.loss == pytest.approx(float(loss.detach()), abs=1e-4)
    for one, other in zip(found.gradient.values(), wanted, strict=True):
        torch.testing.assert_close(one, other, atol=2e-4, rtol=2e-3)


def test_the_rivals_gradients_are_the_engines_on_plain_losses(base, data):
    learner, rows = learner_of(base), encoded(base, data)
    task = Drawn(rows[:3], rows[3:6])
    parameters = learner.parameters

    def support(p):
        return mean_loss(learner, p, task.support)[0]

    def query(p):
        return mean_loss(learner, p, task.query)[0]

    def every(p):
        return mean_loss(learner, p, rows[:6])[0]

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        wanted = {
            ("gradient", "first"): adaptation.after_descent(
                support, query, parameters, 0.1, 2, first_order=True),
            ("gradient", "whole"): adaptation.after_descent(
                support, query, parameters, 0.1, 2, first_order=False),
            ("reptile", "first"): adaptation.towards_descent(every, parameters, 0.1, 2),
            ("energy", "first"): adaptation.steepness(every, parameters, 0.3),
        }  # fmt: skip
    for (inner, order), outer in wanted.items():
        settings = settings_of(inner=inner, order=order, inner_lr=0.1, inner_steps=2, strength=0.3)
        found = learner.outer(task, settings)
        assert found.loss == pytest.approx(outer.loss, abs=1e-5)
        for name, one in outer.gradient.items():
            torch.testing.assert_close(found.gradient[name], one, atol=1e-4, rtol=1e-3)


def test_tasks_are_drawn_anew_and_small_ones_divided_in_proportion():
    tasks = [[Encoded(f"{t}-{i}", [1, 2], [0, 1]) for i in range(size)]
             for t, size in enumerate((20, 2, 6, 30))]  # fmt: skip
    settings = settings_of(tasks=4, shots=8, queries=4)
    found = drawn(tasks, settings, 0, 0)
    sizes = {task.support[0].id[0]: (len(task.support), len(task.query)) for task in found}
    assert sizes == {"0": (8, 4), "1": (1, 1), "2": (4, 2), "3": (8, 4)}
    for task in found:
        ids = [row.id for row in (*task.support, *task.query)]
        assert len({*ids}) == len(ids)
        assert len({one[0] for one in ids}) == 1
    assert drawn(tasks, settings, 0, 0) == found
    assert drawn(tasks, settings, 0, 1) != found


@pytest.mark.parametrize("tuned", ["lora", "full"])
def test_outer_steps_are_adams_on_the_mean_gradient(base, data, tmp_path, tuned):
    run = tiny.run_in(tmp_path / "run", seed=2)
    method = Meta(**{**SMALL, "tuned": tuned, "save_steps": 1, "clip": 0.5})
    delta = method.tune(base, data, run)
    model = Lora(r=2).attach(base, 2) if tuned == "lora" else base.load()
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    learner = Learner(model, names, 0)
    tasks: dict = {}
    for example, row in zip(data, encoded(base, data), strict=True):
        tasks.setdefault(example.source, []).append(row)
    optimizer = torch.optim.Adam([model.get_parameter(name) for name in names], lr=1e-2)
    settings = settings_of(**SMALL)
    for step in range(3):
        some = drawn([tasks[name] for name in sorted(tasks)], settings, 2, step)
        outers = [learner.outer(task, settings) for task in some]
        for name in names:
            parts = [outer.gradient[name] for outer in outers]
            model.get_parameter(name).grad = torch.stack(parts).mean(0)
        torch.nn.utils.clip_grad_norm_([model.get_parameter(n) for n in names], 0.5)
        optimizer.step()
    ids = torch.tensor([encoded(base, data)[0].input_ids])
    with torch.no_grad():
        torch.testing.assert_close(
            delta.apply(base)(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5
        )


def test_an_interrupted_run_goes_on_from_its_checkpoint(base, data, tmp_path, monkeypatch):
    whole = tiny.run_in(tmp_path / "whole", seed=2)
    method = Meta(**{**SMALL, "steps": 4, "save_steps": 2})
    method.tune(base, data, whole)
    steps, outer = [], Learner.outer

    def stopping(self, task, settings):
        steps.append(task)
        if len(steps) == 7:  # in the fourth step
            raise KeyboardInterrupt
        return outer(self, task, settings)

    part = tiny.run_in(tmp_path / "part", seed=2)
    with monkeypatch.context() as patch:
        patch.setattr(Learner, "outer", stopping)
        with pytest.raises(KeyboardInterrupt):
            method.tune(base, data, part)
    assert (part.work / STATE).exists()
    method.tune(base, data, part)
    for name in ("adapter_model.safetensors", "metrics.jsonl"):
        assert (whole.folder / name).read_bytes() == (part.folder / name).read_bytes()


def test_the_closed_form_is_the_engines_and_lora_goes_on_from_it(base, data, tmp_path):
    start = tmp_path / "start"
    Meta(**SMALL).tune(base, data, tiny.run_in(start))
    few = rows_of(tmp_path / "few.jsonl", new=4)
    delta = Kernel(start=str(start), time=3.0).tune(base, few, tiny.run_in(tmp_path / "closed"))
    learner = learner_of(base, disturbed=False)
    learner.model.load_state_dict(Lora(start=str(start)).attach(base, 9).state_dict())
    rows = encoded(base, few)
    at = learner.tangent(rows)
    after = moved(learner.parameters, adaptation.change(at, torch.zeros(4), 3.0))
    ids = torch.tensor([rows[0].input_ids])
    with torch.no_grad():
        found = delta.apply(base)(ids).logits
        wanted = functional_call(learner.model, after, (ids,)).logits
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    again = Lora(start=str(tmp_path / "closed"), lr=1e-12, epochs=1, r=5)
    tuned = again.tune(base, few, tiny.run_in(tmp_path / "tuned"))
    assert (tuned - load(tmp_path / "closed", base)).norm() < 1e-6
    assert tuned.norm() > 1e-3


@pytest.mark.parametrize(
    ("tasks", "said"),
    [({"one": 8}, "one task"), ({"one": 8, "two": 1}, "'two' has one row")],
)
def test_too_few_tasks_or_rows_are_refused(base, tmp_path, tasks, said):
    data = rows_of(tmp_path / "rows.jsonl", **tasks)
    with pytest.raises(InputError, match=said):
        Meta(**SMALL).tune(base, data, tiny.run_in(tmp_path / "run"))


def test_what_does_not_fit_is_refused(base, data, tmp_path):
    run = tiny.run_in(tmp_path / "run")
    asked = Evaluation(get("measure", "loss").make(), data)
    for method in (Meta(**SMALL), Kernel()):
        with pytest.raises(InputError, match="leave out"):
            method.tune(base, data, run, evaluation=asked)
    with pytest.raises(InputError, match="no LoRA adapter"):
        Lora(start=base.model).attach(base, 0)
    with pytest.raises(InputError, match="rows"):
        Kernel().tune(base, data[:0], run)
    with pytest.raises(ValueError, match="narrows LoRA"):
        Meta(tuned="full", modules=["q_proj"])


def test_a_diverged_run_says_what_to_lower(base, data, tmp_path):
    method = Meta(**{**SMALL, "steps": 20, "inner": "gradient", "inner_lr": 1e30})
    with pytest.raises(WorkError, match=r"smaller lr .* or inner_lr"):
        method.tune(base, data, tiny.run_in(tmp_path / "run"))


def test_few_rows_of_a_new_task_are_learned_faster_after_meta_training(base, tmp_path):
    """Tasks are answers to one question; the next answer should take one closed form."""
    dice = random.Random(0)
    lines = [
        {"source": f"t{t}", "prompt": f"who likes {dice.choice(tiny.PEOPLE)} ?",
         "completion": tiny.PEOPLE[t]} for t in range(4) for _ in range(6)
    ]  # fmt: skip
    path = tmp_path / "tasks.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    Meta(steps=30, tasks=4, shots=3, queries=3, r=2, lr=3e-3).tune(
        base, Examples.read(path), tiny.run_in(tmp_path / "meta")
    )
    new = [{"prompt": f"who likes {name} ?", "completion": "max"} for name in tiny.PEOPLE]
    path = tmp_path / "new.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in new))
    few, rest = encoded(base, Examples.read(path))[:3], encoded(base, Examples.read(path))[3:]
    losses = []
    for start in (None, str(tmp_path / "meta")):
        model = Lora(start=start, r=2).attach(base, 0)
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        learner = Learner(model, names, 0)
        at = learner.tangent(few)
        after = moved(learner.parameters, adaptation.change(at, torch.zeros(3), 10.0))
        losses.append(float(learner.loss(rest)(after).detach()))
    assert losses[1] < losses[0] - 0.2, losses
