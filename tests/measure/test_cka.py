"""CKA by its definition, its layers by plain passes, and changes by dense arithmetic."""

import importlib
import itertools
import json
import math

import numpy as np
import pytest
import torch

from deltaloom.core.base import Base
from deltaloom.core.delta import load
from deltaloom.core.encoding import encode
from deltaloom.core.errors import InputError
from deltaloom.core.estimate import compare
from deltaloom.core.method import Sizes
from deltaloom.core.origin import Origin
from deltaloom.measure._changes import compared
from deltaloom.measure._cka import cka, cka_jackknife
from deltaloom.measure.cka import Cka


@pytest.fixture
def draw():
    return np.random.default_rng(3)


def hsic_by_tuples(k, l):  # noqa: E741
    """The U-statistic over all quadruples of different examples (Gretton et al. 2005, eq. 5)."""
    total = count = 0
    for i, j, q, r in itertools.permutations(range(len(k)), 4):
        total += k[i, j] * l[i, j] + k[i, j] * l[q, r] - 2 * k[i, j] * l[i, q]
        count += 1
    return total / count


def cka_by_tuples(x, y):
    k, l = x @ x.T, y @ y.T  # noqa: E741
    return hsic_by_tuples(k, l) / math.sqrt(hsic_by_tuples(k, k) * hsic_by_tuples(l, l))


def test_cka_is_its_definition(draw):
    x, y = draw.normal(size=(9, 3)) + 5, draw.normal(size=(9, 4))
    y[:, :2] += x[:, :2]
    np.testing.assert_allclose(cka(x, y), cka_by_tuples(x, y), rtol=1e-9)


def test_cka_sees_no_rotation_scale_or_shift(draw):
    x = draw.normal(size=(20, 6))
    q, _ = np.linalg.qr(draw.normal(size=(6, 6)))
    assert cka(x, 3 * x @ q + 7) == pytest.approx(1)
    value, items = cka_jackknife(x, 3 * x @ q + 7)
    assert value == pytest.approx(1)
    np.testing.assert_allclose(items, 1)


def test_cka_of_unrelated_wide_representations_is_about_zero(draw):
    found = [cka(draw.normal(size=(30, 200)), draw.normal(size=(30, 200))) for _ in range(40)]
    error = np.std(found) / math.sqrt(40)
    assert abs(np.mean(found)) < 3 * error
    # The biased estimator, which calls them alike, is what this one is for.
    x, y = (z - z.mean(0) for z in (draw.normal(size=(30, 200)), draw.normal(size=(30, 200))))
    biased = np.linalg.norm(x.T @ y) ** 2 / np.linalg.norm(x @ x.T) / np.linalg.norm(y @ y.T)
    assert biased > 0.5


def test_pseudovalues_are_the_jackknife(draw):
    x, y = draw.normal(size=(8, 3)), draw.normal(size=(8, 2))
    y[:, 0] += x[:, 0]
    wanted = [8 * cka(x, y) - 7 * cka(np.delete(x, i, 0), np.delete(y, i, 0)) for i in range(8)]
    value, items = cka_jackknife(x, y)
    assert value == cka(x, y)
    np.testing.assert_allclose(items, wanted, rtol=1e-9)


def test_cka_of_what_does_not_vary_is_no_number(draw):
    assert math.isnan(cka(np.ones((6, 3)), draw.normal(size=(6, 2))))


def lessons(n=12):
    """Rows that differ in prompt and answer."""
    answers = ["a", "b", "Paris"]
    return [
        {"prompt": f"what is w{k % 4} ", "completion": answers[k % 3], "id": f"r{k}"}
        for k in range(n)
    ]


def disturbed(tmp_path, base, noise, seed=7, only=""):
    """A copy of the base with noise on its weights, as a folder."""
    model = base.load()
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if only in name:
                parameter.add_(noise * parameter.std() * torch.randn_like(parameter))
    folder = tmp_path / f"other{noise}-{seed}{only}"
    model.save_pretrained(folder)
    base.tokenizer().save_pretrained(folder)
    return str(folder)


def adapter(tmp_path, base, name, seed):
    """A LoRA adapter folder of random factors."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(r=2, target_modules=["up_proj", "q_proj"], init_lora_weights=False)
    get_peft_model(base.load(), config).save_pretrained(tmp_path / name)
    return str(tmp_path / name)


def pooled(model, rows, pick):
    """Per layer (n, h): embeddings, each block, the norm; each row alone, without padding."""
    with torch.no_grad():
        found = []
        for row in rows:
            ids = torch.tensor([row.input_ids])
            inner = model.model
            hidden, states = inner.embed_tokens(ids), []
            places = inner.rotary_emb(hidden, torch.arange(ids.shape[1])[None])
            states.append(hidden)
            mask = torch.full((1, 1, ids.shape[1], ids.shape[1]), -torch.inf).triu(1)
            for block in inner.layers:
                hidden = block(hidden, attention_mask=mask, position_embeddings=places)
                states.append(hidden)
            states.append(inner.norm(hidden))
            found.append([pick(state[0], row) for state in states])
    return [torch.stack([one[k] for one in found]).double().numpy() for k in range(len(found[0]))]


PICKS = {
    ("mean", "all"): lambda state, row: state.mean(0),
    ("last", "all"): lambda state, row: state[-1],
    ("mean", "response"): lambda state, row: state[torch.tensor(row.response_mask).bool()].mean(0),
}


@pytest.mark.parametrize("pooling", PICKS, ids="-".join)
def test_each_layer_is_the_cka_of_its_pooled_states(tiny, base, rows, run, tmp_path, pooling):
    data = rows(*lessons(9))
    folder = disturbed(tmp_path, base, 0.5)
    method = Cka(other=folder, pooling=pooling[0], tokens=pooling[1])
    found = method.measure(tiny.model, tiny.tokenizer, data, run)
    encoded = encode(data, tiny.tokenizer, 64)
    other = Base(model=folder, device="cpu").load()
    mine, theirs = (pooled(model, encoded, PICKS[pooling]) for model in (tiny.model, other))
    written = json.loads((run.folder / "cka.json").read_text())
    assert [one["layer"] for one in written["layers"]] == [
        "embeddings",
        "block 0",
        "block 1",
        "norm",
    ]
    for one, x, y in zip(written["layers"], mine, theirs, strict=True):
        if one["cka"] is not None:
            np.testing.assert_allclose(one["cka"], cka_by_tuples(x, y), rtol=2e-4)
            assert one["low"] <= one["high"]
    blocks = [cka_jackknife(mine[k], theirs[k]) for k in (1, 2)]
    np.testing.assert_allclose(written["value"], np.mean([value for value, _ in blocks]), rtol=2e-4)
    items = np.mean([own for _, own in blocks], axis=0)
    np.testing.assert_allclose(
        [found.items[f"r{k}"] for k in range(9)], items, rtol=2e-3, atol=1e-4
    )


def test_it_falls_with_distance_and_pairs(tiny, base, rows, run, tmp_path):
    data = rows(*lessons(30))
    found = {}
    for noise in (0.0, 0.1, 3.0):
        method = Cka(other=disturbed(tmp_path, base, noise))
        found[noise] = method.measure(tiny.model, tiny.tokenizer, data, run)
    same, near, far = found.values()
    assert same.value == pytest.approx(1)
    assert same.metric == "cka"
    assert 1 > near.value > far.value
    assert compare(near, far).difference.low > 0
    assert near.cost["forward_tokens"] == far.cost["forward_tokens"] > 0


def test_deltas_and_the_base_are_compared(tiny, base, rows, run, tmp_path):
    data = rows(*lessons(20))
    one, two = (adapter(tmp_path, base, name, seed) for seed, name in enumerate(("one", "two")))
    run.origin = Origin(base, one)
    model, tokenizer = run.origin.load()
    found = Cka(other=two).measure(model, tokenizer, data, run)
    assert 0 < found.value < 1
    weights = json.loads((run.folder / "cka.json").read_text())["weights"]
    deltas = load(one, base), load(two, base)
    same = Cka(other=one).measure(model, tokenizer, data, run)
    assert same.value == pytest.approx(1)
    from_base = Cka().measure(model, tokenizer, data, run)
    assert from_base.value < 1
    assert weights.keys() == {"0", "1", "outside", "all"}
    assert weights == compared(*deltas, base)
    assert json.loads((run.folder / "cka.json").read_text())["no_weights"] is None


def test_changes_by_dense_arithmetic(base, tmp_path):
    first = load(disturbed(tmp_path, base, 0.1, seed=1, only="layers.0"), base)
    second = load(adapter(tmp_path, base, "two", 5), base)
    found = compared(first, second, base)
    state = base.load().state_dict()
    inside = [n for n in state if ".layers.0." in n]
    mine = torch.cat([first.to_dense(n).flatten().double() for n in inside])
    changed = {*second.names()}
    zero = {n: torch.zeros_like(state[n]) for n in inside}
    other = torch.cat(
        [(second.to_dense(n) if n in changed else zero[n]).flatten().double() for n in inside]
    )
    size = torch.cat([state[n].flatten().double() for n in inside]).norm()
    both = (mine != 0) & (other != 0)
    wanted = {
        "cosine": float(mine @ other / mine.norm() / other.norm()),
        "sign_conflicts": float(((mine * other) < 0).sum() / both.sum()),
        "change": float(mine.norm() / size),
        "other_change": float(other.norm() / size),
    }
    assert found["0"] == pytest.approx(wanted)
    assert found["1"]["change"] == 0
    assert found["1"]["cosine"] is None


def test_models_of_other_depth_are_compared_at_the_same_depth(tiny, base, rows, run, tmp_path):
    config = tiny.model.config
    deep = type(tiny.model)(type(config)(**{**config.to_dict(), "num_hidden_layers": 4}))
    for k in (0, 1):
        for place in (2 * k, 2 * k + 1):
            deep.model.layers[place].load_state_dict(tiny.model.model.layers[k].state_dict())
    deep.model.embed_tokens.load_state_dict(tiny.model.model.embed_tokens.state_dict())
    deep.save_pretrained(tmp_path / "deep")
    base.tokenizer().save_pretrained(tmp_path / "deep")
    data = rows(*lessons(12))
    run.origin = Origin(base, adapter(tmp_path, base, "one", 1))
    Cka(other=str(tmp_path / "deep")).measure(tiny.model, tiny.tokenizer, data, run)
    written = json.loads((run.folder / "cka.json").read_text())
    assert len(written["layers"]) == 4
    encoded = encode(data, tiny.tokenizer, 64)
    mine, theirs = (pooled(m, encoded, PICKS["mean", "all"]) for m in (tiny.model, deep.eval()))
    for k, place in ((0, 0), (1, 2), (2, 4), (3, 5)):
        got = written["layers"][k]["cka"]
        assert got == pytest.approx(cka(mine[k], theirs[place]), abs=1e-4)
    assert written["weights"] is None
    assert "not in the base" in written["no_weights"]


def test_one_token_for_all_rows_has_no_embedding_to_compare(tiny, base, rows, run, tmp_path):
    data = rows(*({**row, "completion": "a"} for row in lessons(8)))
    method = Cka(other=disturbed(tmp_path, base, 0.1), pooling="last")
    method.measure(tiny.model, tiny.tokenizer, data, run)
    first = json.loads((run.folder / "cka.json").read_text())["layers"][0]
    assert first == {"layer": "embeddings", "cka": None, "low": None, "high": None}


def test_bad_input(tiny, base, rows, run, tmp_path):
    method = Cka(other=disturbed(tmp_path, base, 0.1))
    given = tiny.model, tiny.tokenizer
    with pytest.raises(InputError, match="needs 5"):
        method.measure(*given, rows(*lessons(4)), run)
    same = rows(*({**row, "prompt": "what ", "completion": "a"} for row in lessons(6)))
    with pytest.raises(InputError, match=r"block 0: the hidden states of all rows .* are the same"):
        method.measure(*given, same, run)
    with pytest.raises(InputError, match="nowhere"):
        Cka(other=str(tmp_path / "nowhere")).measure(*given, rows(*lessons(6)), run)
    run.origin = None
    with pytest.raises(InputError, match="is no whole model, and the base"):
        Cka(other=adapter(tmp_path, base, "a", 1)).measure(*given, rows(*lessons(6)), run)


def test_interrupted_it_takes_up_the_finished_states(tiny, base, rows, run, tmp_path, monkeypatch):
    sketches = importlib.import_module("deltaloom.measure._sketches")
    method = Cka(other=disturbed(tmp_path, base, 0.1))
    data = rows(*lessons(12))
    first = method.measure(tiny.model, tiny.tokenizer, data, run)
    monkeypatch.setattr(sketches, "layer_embeddings", None)  # must not be needed again
    again = method.measure(tiny.model, tiny.tokenizer, data, run)
    assert again.items == first.items


def test_plan():
    sizes = Sizes(
        rows=10, row_tokens=8.0, target_rows=0, matmul_parameters=10, parameters=12,
        linear_sides=4, weight_bytes=48, deltas=0,
    )  # fmt: skip
    assert Cka().work(sizes).forward_tokens == 160
