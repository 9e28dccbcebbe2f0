"""`tune mezo` against its own engine, PEFT, and weights that are moved by hand."""

import json

import pytest
import tiny
import torch
from safetensors.torch import load_file

import deltaloom
from deltaloom.core.base import Base
from deltaloom.core.delta import load
from deltaloom.core.deltas.trace import START, STORED, Steps, Trace
from deltaloom.core.errors import InputError, WorkError
from deltaloom.core.run import Run
from deltaloom.engine import descend as engine
from deltaloom.testing import product


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("mezo")
    tiny.base_in(home / "base")
    tiny.rows_in(home / "rows.jsonl")
    with open(home / "questions.jsonl", "w", encoding="utf-8") as file:
        for line in (home / "rows.jsonl").read_text().splitlines():
            row = json.loads(line)
            cities = list(tiny.CITIES)
            row |= {"choices": cities, "answer": cities.index(row["completion"])}
            file.write(json.dumps(row) + "\n")
    return home


def tuned(home, out, rows="rows.jsonl", **settings):
    values = {"base": home / "base", "lr": 1e-4, "steps": 6, "batch_size": 8, **settings}
    return deltaloom.tune("mezo", data=home / rows, out=out, **values)


def trained(monkeypatch):
    """The models that `descend` leaves, by spying on it."""
    models = []
    plain = engine.descend

    def spy(model, *rest, **named):
        models.append(model)
        return plain(model, *rest, **named)

    monkeypatch.setattr(engine, "descend", spy)
    return models


CASES = [
    {},
    {"rank": 3, "perturbations": 2, "schedule": "cosine", "warmup": 0.4},
    {"direction": "rademacher", "update": "momentum"},
    {"direction": "gaussian", "perturbations": 2},
    {"update": "adam", "micro_batch": 3, "parameters": r"layers\.1\.|norm"},
    {"dtype": "bfloat16", "update": "adam"},
    {"dtype": "float16", "direction": "rademacher"},
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_trace_replays_to_the_trained_weights_to_the_bit(home, tmp_path, monkeypatch, case):
    models = trained(monkeypatch)
    settings = dict(case)
    base = Base(model=str(home / "base"), dtype=settings.pop("dtype", "auto"))
    delta = tuned(home, tmp_path / "out", base=base, **settings)
    assert isinstance(delta, Trace)
    wanted = models[0].state_dict()
    found = load(tmp_path / "out", base).apply(base).state_dict()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    own = base.load().state_dict()
    changed = {name for name in own if not torch.equal(own[name], wanted[name])}
    moved = {name for name in own if name in delta.names() or name == "lm_head.weight"}
    if "parameters" in case:
        assert changed == {*delta.names()}
        assert all("layers.1." in name or "norm" in name for name in changed)
    assert changed <= moved


@pytest.mark.parametrize("kind", ["lora", "prefix"])
def test_adapters_are_pefts_and_replay_to_the_bit(home, tmp_path, kind):
    from peft import PeftModel

    delta = tuned(home, tmp_path / "out", tuned=kind, lr=1e-2, virtual_tokens=3)
    assert delta.kind == {"lora": "lowrank", "prefix": "prompt"}[kind]
    steps = Steps.load(tmp_path / "out" / STORED)
    stored = load_file(tmp_path / "out" / STORED)
    base = Base(model=str(home / "base"))
    place = base.resolved_device()  # the bits are those of the device that made the run
    weights = {n: stored[START + n].to(place, copy=True) for n in steps.parameters}
    start = {name: value.clone() for name, value in weights.items()}
    steps.replay(weights)
    adapter = load_file(tmp_path / "out" / "adapter_model.safetensors", device=place)
    if kind == "lora":
        named = {n.replace(".default", ""): value for n, value in weights.items()}
        assert named.keys() == adapter.keys()
    else:
        named = {"prompt_embeddings": weights["prompt_encoder.default.embedding.weight"]}
        assert named["prompt_embeddings"].shape[0] == 3
    assert all(torch.equal(named[name], value) for name, value in adapter.items())
    assert any(not torch.equal(start[name], value) for name, value in weights.items())

    ids = torch.tensor([[1, 5, 6, 8, 17, 14, 2]]).to(place)
    peft = PeftModel.from_pretrained(base.load(), tmp_path / "out").eval()
    with torch.no_grad():
        wanted = peft(ids).logits
        assert torch.equal(delta.apply(base)(ids).logits, wanted)
        assert not torch.allclose(base.load()(ids).logits, wanted, atol=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {"update": "adam", "perturbations": 2},
        {"tuned": "lora", "direction": "gaussian", "lr": 1e-2},
        {"evaluate": {"data": "rows.jsonl", "every": 2}},
    ],
    ids=str,
)
def test_interrupted_runs_end_in_the_same_bytes(home, tmp_path, monkeypatch, settings):
    if "evaluate" in settings:
        settings = {"evaluate": {"data": [str(home / "rows.jsonl")], "every": 2}}
    tuned(home, tmp_path / "whole", **settings)
    plain = engine._Stepper.step
    for last in (1, 4):
        left = [last]

        def stopping(self, number, left=left):
            if number == left[0]:
                left[0] = -1
                raise KeyboardInterrupt
            return plain(self, number)

        monkeypatch.setattr(engine._Stepper, "step", stopping)
        out = tmp_path / f"cut-{last}"
        with pytest.raises(KeyboardInterrupt):
            tuned(home, out, **settings)
        # a line that was cut short counts as not written
        with open(out / ".work" / "steps.jsonl", "a") as file:
            file.write('{"lr":0.0001,"sca')
        tuned(home, out, **settings)
        assert product(out) == product(tmp_path / "whole")


def test_the_best_evaluation_is_kept_and_stops_the_run(home, tmp_path):
    evaluate = {"data": [str(home / "rows.jsonl")], "every": 2}
    # steps that go astray: the first evaluation stays the best
    tuned(home, tmp_path / "out", lr=0.3, steps=40, patience=2, evaluate=evaluate)
    record = Run.read(tmp_path / "out")
    best = record["notes"]["best_evaluation"]
    assert record["notes"]["steps"] == best["step"]
    lines = [json.loads(one) for one in (tmp_path / "out" / "metrics.jsonl").open()]
    judged = {
        one["step"]: one["evaluation_loss_per_token"]
        for one in lines
        if "evaluation_loss_per_token" in one
    }
    assert min(judged, key=judged.get) == best["step"]
    assert len(judged) < 20
    assert max(judged) == best["step"] + 4
    again = deltaloom.measure(
        "loss",
        base=home / "base",
        deltas=[tmp_path / "out"],
        tasks=home / "rows.jsonl",
        out=tmp_path / "m",
    )
    (estimate,) = again.values()
    assert estimate.value == pytest.approx(judged[best["step"]], rel=1e-5)


def test_it_learns(home, tmp_path):
    tuned(home, tmp_path / "out", lr=3e-3, steps=150)
    lines = [json.loads(one) for one in (tmp_path / "out" / "metrics.jsonl").open()]
    losses = [one["loss"] for one in lines]
    assert sum(losses[-15:]) / 15 < 0.8 * sum(losses[:15]) / 15


def test_a_trace_merges_with_an_adapter(home, tmp_path):
    trace = tuned(home, tmp_path / "trace", lr=1e-2)
    adapter = tuned(home, tmp_path / "adapter", tuned="lora", lr=1e-2)
    deltas = [tmp_path / "trace", tmp_path / "adapter"]
    merged = deltaloom.merge(
        "task_arithmetic", base=home / "base", deltas=deltas, out=tmp_path / "merged"
    )
    wanted = trace + adapter
    for name in wanted.names():
        torch.testing.assert_close(
            merged.to_dense(name), wanted.to_dense(name), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("objective", ["accuracy", "exact_match", "rewards:short"])
@pytest.mark.parametrize("direction", ["lowrank", "gaussian"])
def test_objectives_without_a_gradient(home, tmp_path, monkeypatch, objective, direction):
    (tmp_path / "rewards.py").write_text(
        "def short(rows, answers):\n"
        "    assert all(row.prompt for row in rows)\n"
        "    return [-float(len(answer)) for answer in answers]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    settings = {"objective": objective, "direction": direction, "eps": 0.3, "new_tokens": 4}
    tuned(home, tmp_path / "out", "questions.jsonl", **settings)
    steps = Steps.load(tmp_path / "out" / STORED)
    assert len(steps.found) == 6
    if objective == "rewards:short":
        assert any(one.values[0] for one in steps.found)
    assert Run.read(tmp_path / "out")["cost"]["forward_tokens"] > 0


def test_accuracy_is_that_of_the_moved_model(home):
    from deltaloom.core.deltas.descent import Rule
    from deltaloom.core.examples import Examples
    from deltaloom.engine.perturb import Perturbed
    from deltaloom.measure.choice import Choice
    from deltaloom.tune._objectives import Accuracy

    base = Base(model=str(home / "base"))
    model, data = base.load(), Examples.read(home / "questions.jsonl")
    rule = Rule(
        seed=0,
        direction="lowrank",
        rank=1,
        eps=0.5,
        update="sgd",
        momentum=0.9,
        decay=0.9,
    )
    names = [name for name, _ in model.named_parameters()]
    with Perturbed(model, names, rule) as moved:
        plus, minus, _ = Accuracy(model, base.tokenizer(), data, 64)(moved, range(len(data)))
    values = []
    for sign in (1, -1):
        other = base.load()
        with torch.no_grad():
            for name, p in other.named_parameters():
                p.add_(rule.directions.of(0, 0, name, p).dense(), alpha=sign * rule.eps)
        run = tiny.run_in(home / f"run{sign}")
        values.append(-Choice().measure(other, base.tokenizer(), data, run).value)
    assert [plus, minus] == pytest.approx(values)
    assert plus != minus


def test_what_cannot_work_is_refused_in_a_sentence(home, tmp_path):
    out = tmp_path / "out"
    narrow = Base(model=str(home / "base"), dtype="bfloat16")
    cases = [
        ({"direction": "gaussian", "base": narrow}, "moves weights in place"),
        ({"update": "adam", "lr": None}, "has no published lr; give lr"),
        ({"parameters": "("}, "parameters = '\\('"),
        ({"parameters": "mixer"}, "found in no name; names are like model"),
        ({"objective": "nowhere:reward"}, "does not import"),
        ({"objective": "precision"}, "objective = 'precision'"),
        ({"objective": "accuracy"}, "needs 'choices' with an 'answer'"),
    ]
    for settings, message in cases:
        with pytest.raises(InputError, match=message):
            tuned(home, out, **settings)
        assert not out.exists()


def test_an_objective_that_is_not_finite_stops_with_the_step(home, tmp_path):
    with pytest.raises(WorkError, match=r"at step \d+; try a smaller lr \(it is 1e\+38\)"):
        tuned(home, tmp_path / "out", lr=1e38)


def test_rows_over_the_limit_are_counted(home, tmp_path):
    tuned(home, tmp_path / "out", max_length=6)
    notes = Run.read(tmp_path / "out")["notes"]
    assert notes["truncated_rows"] > 0
    assert notes["max_length"] == 6
