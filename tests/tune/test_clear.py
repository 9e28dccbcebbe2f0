"""CleaR: plain tuning where nothing is routed, its judgements and its loss by hand."""

import json

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch.nn import functional

import deltaloom
from deltaloom.core.base import Base
from deltaloom.core.delta import load
from deltaloom.core.errors import InputError
from deltaloom.core.examples import Examples
from deltaloom.core.features import Features
from deltaloom.core.run import Run
from deltaloom.tune import _routing
from deltaloom.tune.clear import Clear

SETTINGS = {"epochs": 3, "warm_up": 1, "batch_size": 8, "lr": 1e-2}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("clear")
    tiny.base_in(home / "base")
    tiny.rows_in(home / "rows.jsonl")
    return home


def tuned(home, out, method="clear", **settings):
    values = {**SETTINGS, **settings}
    if method != "clear":
        values.pop("warm_up")
    return deltaloom.tune(method, base=home / "base", data=home / "rows.jsonl", out=out, **values)


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("micro", [None, 4])
def test_where_all_labels_look_right_it_is_plain_lora(home, tmp_path, monkeypatch, micro):
    monkeypatch.setattr(_routing, "lower_component", lambda losses: np.ones(len(losses)))
    plain = {"micro_batch": micro}
    tuned(home, tmp_path / "lora", "lora", **plain)
    tuned(home, tmp_path / "clear", cap=1.0, consistency=0.0, **plain)
    tuned(home, tmp_path / "routed", **plain)
    files = [(tmp_path / n / "adapter_model.safetensors").read_bytes() for n in ("lora", "clear")]
    assert files[0] == files[1]
    assert not same(weights(tmp_path / "lora"), weights(tmp_path / "routed"))


@pytest.mark.parametrize("kind", ["bottleneck", "prefix"])
def test_where_all_labels_look_right_it_is_plain_peft(home, tmp_path, monkeypatch, kind):
    from deltaloom.engine.train import fit
    from deltaloom.tune._gradient import rows_for

    monkeypatch.setattr(_routing, "lower_component", lambda losses: np.ones(len(losses)))
    tuned(home, tmp_path / "clear", adapter=kind, cap=1.0, consistency=0.0)
    method = Clear(adapter=kind, **SETTINGS)
    base = Base(model=str(home / "base"))
    run, tokenizer = tiny.run_in(tmp_path / "plain"), base.tokenizer()
    model = method.attach(base, 0)
    rows = rows_for(base, tokenizer, Examples.read(home / "rows.jsonl"), None, run)
    settings = method.train_settings(method.lr, trainable="adapter")
    fit(model, rows, tokenizer.pad_token_id, settings, run)
    model.save_pretrained(tmp_path / "peft")
    assert same(weights(tmp_path / "clear"), weights(tmp_path / "peft"))


@pytest.mark.parametrize("kind", ["lora", "bottleneck", "prefix"])
def test_the_product_is_a_peft_adapter(home, tmp_path, kind):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    delta = tuned(home, tmp_path / "out", adapter=kind)
    bare = AutoModelForCausalLM.from_pretrained(home / "base")
    model = PeftModel.from_pretrained(bare, tmp_path / "out").eval()
    ids = torch.tensor([[1, 5, 6, 8, 17]])
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
        got = delta.apply(Base(model=str(home / "base")))(input_ids=ids).logits
        base = AutoModelForCausalLM.from_pretrained(home / "base")(input_ids=ids).logits
    assert torch.equal(wanted, got)
    assert not torch.allclose(wanted, base, atol=1e-3)


def test_a_module_that_is_no_change_of_tensors_says_so(home, tmp_path):
    delta = tuned(home, tmp_path / "out", adapter="bottleneck")
    delta.save(tmp_path / "copy")
    again = load(tmp_path / "copy", Base(model=str(home / "base")))
    assert again.kind == delta.kind == "bottleneck"
    assert same(weights(tmp_path / "copy"), weights(tmp_path / "out"))
    with pytest.raises(InputError, match="cannot be merged"):
        delta + delta
    with pytest.raises(InputError, match="cannot be merged"):
        deltaloom.merge(
            "average", base=home / "base", deltas=[tmp_path / "out"], out=tmp_path / "merged"
        )


def test_every_row_is_judged(home, tmp_path):
    tuned(home, tmp_path / "out")
    store = Features.open(tmp_path / "out" / "scores")
    rows = Examples.read(home / "rows.jsonl")
    assert store.ids == rows.ids
    assert store.width == 1
    scores = dict(zip(store.ids, store.index["score"], strict=True))
    lines = (tmp_path / "out" / "suspicious.jsonl").read_text().splitlines()
    shown = [json.loads(line) for line in lines]
    assert {one["id"] for one in shown} == {key for key, value in scores.items() if value < 0.5}
    assert [one["score"] for one in shown] == sorted(one["score"] for one in shown)
    assert shown[0]["completion"] == rows[rows.ids.index(shown[0]["id"])].completion
    logged = [
        json.loads(x) for x in (tmp_path / "out" / "metrics.jsonl").read_text().split("\n")[:-1]
    ]
    assert [one["step"] for one in logged if "clean_share" in one] == [4, 7]
    notes = Run.read(tmp_path / "out")["cost"]
    assert notes["forward_tokens"] > notes["backward_tokens"]


def judged(home, tmp_path, **settings):
    """A routing that has judged the rows twice, the model, and the rows."""
    from deltaloom.tune._gradient import rows_for

    method = Clear(**{**SETTINGS, **settings})
    base = Base(model=str(home / "base"))
    model = method.attach(base, 0)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    run = tiny.run_in(tmp_path)
    how = _routing.How(**{n: getattr(method, n) for n in _routing.How.__dataclass_fields__})
    routing = _routing.CleanRouting(model, how, run)
    rows = rows_for(base, base.tokenizer(), Examples.read(home / "rows.jsonl"), None, run)
    routing.begin_training(rows, 0)
    return routing, model, rows


def test_losses_and_targets_by_hand(home, tmp_path):
    """Row by row, in float64, the gates of each pass applied by zeroing a layer's B."""
    routing, model, rows = judged(home, tmp_path, passes=2, outcomes=4, temperature=0.5)
    found = routing._judged(model, 1)
    own = model.double()
    kept = {n: p.detach().clone() for n, p in own.named_parameters() if "lora_B" in n}
    gates = [routing._drawn(np.ones(len(rows)), _routing.JUDGING, 1, k) for k in range(2)]
    assert 0.7 < torch.stack(gates).double().mean() < 0.97
    start = 0
    for number, row in enumerate(rows):
        ids = torch.tensor([row.input_ids])
        total = 0.0
        for one in gates:
            with torch.no_grad():
                for name, parameter in own.named_parameters():
                    if name in kept:
                        layer = int(".layers.1." in name)
                        parameter.copy_(kept[name] * int(one[number, layer]))
                total = total + own(input_ids=ids).logits[0]
        at = [t for t in range(1, len(row.input_ids)) if row.response_mask[t]]
        mean = total[[t - 1 for t in at]] / 2
        loss = functional.cross_entropy(mean, ids[0, at])
        assert found.losses[number] == pytest.approx(loss.item(), abs=1e-5)
        chances = (mean / 0.5).softmax(-1)
        for k, want in enumerate(chances):
            top = want.topk(4)
            assert found.ids[start + k].tolist() == top.indices.tolist()
            assert torch.allclose(found.targets[start + k, :4].double(), top.values, atol=1e-5)
            assert found.targets[start + k, 4].item() == pytest.approx(
                1 - top.values.sum().item(), abs=1e-5
            )
        start += len(at)
    assert start == len(found.ids)


def test_losses_are_smoothed_over_the_epochs(home, tmp_path):
    routing, model, _ = judged(home, tmp_path)
    first = routing._judged(model, 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(1.5)
    fresh = routing._looked(model, 2)[0]
    second = routing._judged(model, 2)
    assert not torch.allclose(first.losses, fresh, atol=1e-3)
    assert torch.allclose(second.losses, 0.9 * first.losses + 0.1 * fresh)


@pytest.mark.parametrize("outcomes", [3, 7, 50])
def test_the_consistency_loss_is_its_formula(outcomes):
    torch.manual_seed(0)
    old, new = torch.randn(2, 5, 7, dtype=torch.float64) * 3
    new.requires_grad_()
    ids, targets = _routing.targets_of(old, 2.0, outcomes)
    found = _routing.consistency_loss(new, ids, targets, 2.0)
    q, p = (old / 2.0).softmax(-1), (new / 2.0).softmax(-1)
    wanted = 0.0
    for row in range(5):
        kept = ids[row].tolist()
        rest = [k for k in range(7) if k not in kept]
        wanted = wanted - sum(q[row, k] * p[row, k].log() for k in kept)
        if rest:
            wanted = wanted - q[row, rest].sum() * p[row, rest].sum().log()
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5)
    grads = [torch.autograd.grad(one, new, retain_graph=True)[0] for one in (found, wanted)]
    assert torch.allclose(*grads, rtol=1e-4, atol=1e-6)


def test_gates_of_training_follow_what_looks_right(home, tmp_path, monkeypatch):
    clean = np.linspace(0, 1, 24)
    monkeypatch.setattr(_routing, "lower_component", lambda losses: clean)
    routing, model, _ = judged(home, tmp_path, cap=0.8)
    routing.begin_epoch(model, 0, 0, False)
    routing.begin_batch(torch.tensor([5, 2]))
    assert torch.equal(routing.router.gates, routing._drawn(np.ones(24), 0, 0)[[5, 2]])
    routing.begin_epoch(model, 1, 3, False)
    draws = np.random.default_rng((0, 0, 1)).random((24, 2)) < 0.8 * clean[:, None]
    assert torch.equal(routing._gates, torch.from_numpy(draws.astype(np.uint8)))
    routing.end_batch()
    assert routing.router.gates is None


def test_dropped_rows_leave_the_mean_of_the_others(home, tmp_path, monkeypatch):
    clean = np.array([0.9, 0.2] * 12)
    monkeypatch.setattr(_routing, "lower_component", lambda losses: clean)
    routing, model, rows = judged(home, tmp_path, rule="drop")
    routing.begin_epoch(model, 1, 3, False)
    from deltaloom.engine.train import collate

    numbers = [3, 0, 4]
    inputs = collate([rows[i] for i in numbers], 0)
    routing.begin_batch(torch.tensor(numbers))
    assert routing.router.gates is None
    out = model(**inputs)
    items = int((inputs["labels"][:, 1:] != -100).sum())
    added = routing.added_loss(out.logits, inputs["labels"], torch.tensor(numbers), items)
    only = collate([rows[i] for i in (0, 4)], 0)
    assert (out.loss + added).item() == pytest.approx(model(**only).loss.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"warm_up": 3}, "leaves nothing of epochs = 3"),
        ({"adapter": "prefix", "modules": ["q_proj"]}, "modules is not for prefixes"),
        ({"adapter": "bottleneck", "modules": ["query"]}, "query"),
    ],
)
def test_wrong_settings_are_said(home, tmp_path, settings, said):
    with pytest.raises(InputError, match=said):
        tuned(home, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()
