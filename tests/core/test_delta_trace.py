"""Traces as deltas: laws, files, and what is refused."""

import json

import pytest
import tiny
import torch
from changes import EXACT, agree, combined, dense, trained_in, tuned_in
from safetensors.torch import load_file, save_file

from deltaloom.core.base import Base
from deltaloom.core.delta import load
from deltaloom.core.deltas.dense import Dense
from deltaloom.core.deltas.descent import Rule, Scalars
from deltaloom.core.deltas.trace import STORED, Form, Steps, Trace
from deltaloom.core.errors import InputError


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("trace")
    tiny.base_in(home / "base")
    return home


@pytest.fixture(scope="module")
def base(home):
    return Base(model=str(home / "base"))


def rule(**changes):
    settings = {
        "seed": 3,
        "direction": "lowrank",
        "rank": 2,
        "eps": 1e-3,
        "update": "sgd",
        "momentum": 0.9,
        "decay": 0.99,
    }
    return Rule(**{**settings, **changes})


def steps_on(model, pattern="", count=5, dtype="float32", **changes):
    generator = torch.Generator().manual_seed(0)
    forms = {n: Form.of(p) for n, p in model.named_parameters() if pattern in n}
    values = torch.randn(count, 2, generator=generator).tolist()
    return Steps(rule(**changes), forms, dtype, [Scalars(0.0078125, tuple(row)) for row in values])


@pytest.fixture
def trace(base):
    return Trace(base, steps_on(base.load()))


@pytest.mark.parametrize("direction", ["lowrank", "rademacher", "gaussian"])
@pytest.mark.parametrize("update", ["sgd", "momentum", "adam"])
def test_tensor_by_tensor_is_the_whole_replay(base, direction, update):
    delta = Trace(base, steps_on(base.load(), direction=direction, update=update))
    model, own = delta.apply(base).state_dict(), base.load().state_dict()
    assert delta.names() == sorted(n for n, _ in base.load().named_parameters())
    for name in delta.names():
        assert torch.equal(delta.to_dense(name), model[name] - own[name])
        assert delta.shape(name) == tuple(own[name].shape)
        assert delta.to_dense(name).abs().max() > 0


def test_threads_change_no_bit(base, trace):
    before = torch.get_num_threads()
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        tensor = torch.zeros(1200, 700)
        steps = steps_on(base.load(), direction="lowrank").found
        from deltaloom.core.deltas.descent import replay

        replay(rule(), "w", tensor, steps)
        found.append(tensor)
    torch.set_num_threads(before)
    assert torch.equal(*found)


def test_laws(base, trace, home, tmp_path):
    assert 1 * trace is trace
    trace.save(tmp_path / "saved")
    again = load(tmp_path / "saved", base)
    assert isinstance(again, Trace)
    assert again.steps == trace.steps
    agree(dense(again), dense(trace), close=False)
    doubled = 2 * trace
    assert isinstance(doubled, Dense)
    agree(dense(doubled), combined([(2, dense(trace))]))
    assert (trace - trace).norm() == 0
    other = load(tuned_in(home / "tuned", base), base)
    adapter = load(trained_in(home / "adapter", base), base)
    for second in (other, adapter):
        agree(dense(trace + second), combined([(1, dense(trace)), (1, dense(second))]))
        agree(dense(second + trace), combined([(1, dense(trace)), (1, dense(second))]))
        wanted = sum((dense(trace)[n] * dense(second)[n]).sum() for n in dense(second))
        assert trace.dot(second) == pytest.approx(float(wanted), rel=1e-6)
    assert trace.norm() == pytest.approx(trace.dot(trace) ** 0.5)


def test_a_sum_is_saved_as_dense(base, trace, tmp_path):
    (0.5 * trace).save(tmp_path / "half")
    agree(dense(load(tmp_path / "half", base)), combined([(0.5, dense(trace))]))


def test_a_16_bit_run_replays_in_its_type(home, base, tmp_path):
    narrow = base.model_copy(update={"dtype": "bfloat16"})
    delta = Trace(narrow, steps_on(narrow.load(), dtype="bfloat16"))
    model = delta.apply(narrow)
    assert model.dtype == torch.bfloat16
    stored = load_file(home / "base" / "model.safetensors")
    for name in delta.names():
        wanted = model.state_dict()[name].float() - stored[name]
        torch.testing.assert_close(delta.to_dense(name), wanted, **EXACT)


def test_a_tied_pair_stored_under_the_heads_name(home, tmp_path):
    tiny.base_in(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    weights = load_file(file)
    weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")
    save_file(weights, file, metadata={"format": "pt"})
    base = Base(model=str(tmp_path / "base"))
    delta = Trace(base, steps_on(base.load(), pattern="embed"))
    delta.save(tmp_path / "saved")
    delta = load(tmp_path / "saved", base)
    assert delta.names() == ["lm_head.weight"]
    change = delta.apply(base).lm_head.weight - base.load().lm_head.weight
    assert torch.equal(delta.to_dense("lm_head.weight"), change)


def test_a_trace_is_small(trace, tmp_path):
    steps = Steps(
        trace.steps.rule, trace.steps.parameters, "float32", [Scalars(1.0, (0.5,))] * 9000
    )
    steps.save(tmp_path / STORED)
    assert (tmp_path / STORED).stat().st_size < 9000 * 8 + 4000


def test_broken_traces_are_refused(base, trace, tmp_path):
    folder = tmp_path / "saved"
    trace.save(folder)
    tensors = load_file(folder / STORED)
    save_file(tensors, folder / STORED, metadata={"format": "pt"})
    with pytest.raises(InputError, match="is not a whole trace"):
        load(folder, base)
    about = {"rule": {}, "parameters": {}, "dtype": "float32"}
    save_file(tensors, folder / STORED, metadata={"trace": json.dumps(about)})
    with pytest.raises(InputError, match="is not a whole trace"):
        load(folder, base)


def test_a_trace_of_another_base_is_refused(base, trace, tmp_path):
    trace.save(tmp_path / "saved")
    other = Base(model=str(tiny.base_in(tmp_path / "other", hidden_size=32)))
    with pytest.raises(InputError, match="name the base it was tuned from"):
        load(tmp_path / "saved", other)
    (tmp_path / "saved" / "delta.json").unlink()
    with pytest.raises(InputError, match="name the base of the run"):
        load(tmp_path / "saved", other)
