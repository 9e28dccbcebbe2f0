"""Task arithmetic's family against whole-tensor float64 arithmetic, and the laws it must keep."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from deltaloom.core.errors import InputError
from deltaloom.core.registry import get, methods
from deltaloom.core.spec import explain
from deltaloom.core.tensors import TensorEntry
from deltaloom.merge._rule import Block
from deltaloom.merge.arithmetic import PRESETS, Arithmetic

SHAPES = {"model.embed_tokens.weight": (60, 32), "w.weight": (700, 9), "norm.weight": (17,)}


def random_models(count, dtype, seed=0):
    """A base and `count` tuned models as numbers of `dtype`."""
    generator = torch.Generator().manual_seed(seed)
    models = [{n: torch.randn(s, generator=generator).to(dtype) for n, s in SHAPES.items()}]
    for _ in range(count):
        step = {n: 0.1 * torch.randn(s, generator=generator) for n, s in SHAPES.items()}
        models.append({n: (models[0][n].float() + step[n]).to(dtype) for n in SHAPES})
    return models


def write(tmp_path, models):
    paths = []
    for i, tensors in enumerate(models):
        paths.append(tmp_path / f"model{i}")
        paths[-1].mkdir()
        (paths[-1] / "config.json").write_text(json.dumps({"tie_word_embeddings": False}))
        save_file(tensors, paths[-1] / "model.safetensors", {"format": "pt"})
    return paths


def merged(tmp_path, models, method, name="out"):
    paths = write(tmp_path, models)
    out = method.merge_folders(paths[0], paths[1:], tmp_path / name)
    return load_file(out / "model.safetensors")


# ---- the family once more, on whole tensors in float64, in the order of the papers ----


def largest(change, density):
    """The floor(density n) largest magnitudes, the earlier of equals, as 0 or 1."""
    magnitudes = np.abs(change.ravel()).astype(np.float32)
    kept = max(1, int(density * magnitudes.size))
    mask = np.zeros(magnitudes.size)
    mask[np.argsort(-magnitudes, kind="stable")[:kept]] = 1
    return mask.reshape(change.shape)


def expected(models, name, weights, scale=1.0, density=1.0, vote=False, normalize=False):
    base, *tuned = (model[name].double().numpy() for model in models)
    changes = [(one - base) for one in tuned]
    changes = [change * largest(change, density) for change in changes]
    weighted = np.stack([w * change for w, change in zip(weights, changes, strict=True)])
    total = weighted.sum(0)
    if not vote:
        return base + scale * total / (sum(weights) if normalize else 1), np.zeros(base.shape, bool)
    elected = np.where(total >= 0, 1, -1)
    agrees = np.sign(weighted) == elected
    mass = (np.array(weights).reshape(-1, *[1] * base.ndim) * agrees).sum(0)
    summed = (weighted * agrees).sum(0)
    if normalize:
        summed = summed / np.where(mass == 0, 1, mass)
    # where the sum nearly cancels, its sign is a matter of the last bit
    exact = all(w == round(w) for w in weights)
    unsure = (np.abs(total) <= 1e-5 * np.abs(weighted).sum(0)) & (weighted != 0).any(0)
    unsure &= (total != 0) | (not exact)
    return base + scale * summed, unsure


def check(got, wanted, unsure, dtype):
    assert unsure.sum() <= 1 + 0.02 * unsure.size
    rounded = torch.from_numpy(wanted).to(dtype)
    ulp = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 2e-6}[dtype]
    close = torch.isclose(got.double(), rounded.double(), rtol=ulp, atol=1e-6).numpy()
    assert (close | unsure).all()
    if dtype != torch.float32:  # float32 inside: hardly any rounding differs from the exact one
        assert (got != rounded).numpy()[~unsure].mean() < 0.005


DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weights", [None, [0.3, 0.5, 1.1]])
def test_average_and_task_arithmetic(tmp_path, dtype, weights):
    models = random_models(3, dtype)
    for preset, normalize in (("average", True), ("task_arithmetic", False)):
        folder = tmp_path / preset
        folder.mkdir()
        method = get("merge", preset).make({"weights": weights, "scale": 0.7})
        got = merged(folder, models, method)
        for name in SHAPES:
            wanted = expected(models, name, weights or [1] * 3, 0.7, normalize=normalize)
            check(got[name], *wanted, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("density", [0.02, 0.2, 0.77, 1.0])
@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.4, 0.9, 0.3]])
def test_ties(tmp_path, dtype, density, weights):
    models = random_models(len(weights), dtype)
    values = {"density": density, "weights": weights, "block": 300, "scale": 0.9}
    got = merged(tmp_path, models, get("merge", "ties").make(values))
    for name in SHAPES:
        wanted = expected(models, name, weights, 0.9, density, vote=True, normalize=True)
        check(got[name], *wanted, dtype)


@pytest.mark.parametrize("vote", [False, True])
def test_trimmed_sums(tmp_path, vote):
    models = random_models(2, torch.float32)
    method = Arithmetic(sparsify="magnitude", density=0.4, consensus=vote, weights=[1, 0.5])
    got = merged(tmp_path, models, method)
    for name in SHAPES:
        check(got[name], *expected(models, name, [1, 0.5], 1, 0.4, vote), torch.float32)


def middle(change, density, gamma):
    """1 for the elements after the floor(gamma n) largest, as many as density says, else 0."""
    magnitudes = np.abs(change.ravel()).astype(np.float32)
    n = magnitudes.size
    kept = max(1, int(density * n))
    top = min(int(gamma * n), n - kept)
    mask = np.zeros(n)
    mask[np.argsort(-magnitudes, kind="stable")[top : top + kept]] = 1
    return mask.reshape(change.shape)


def masked(models, mask):
    """The models with their changes times `mask(change)`, float64."""
    base = {name: tensor.double() for name, tensor in models[0].items()}
    rest = []
    for model in models[1:]:
        changes = {name: model[name].double() - base[name] for name in base}
        kept = {name: torch.from_numpy(mask(c.numpy())) for name, c in changes.items()}
        rest.append({name: base[name] + kept[name] * changes[name] for name in base})
    return [base, *rest]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("density", "gamma"), [(0.9, 0.01), (0.3, 0.2), (0.9, 0.2), (1.0, 0.1)])
def test_breadcrumbs(tmp_path, dtype, density, gamma):
    models = random_models(2, dtype)
    wanted = masked(models, lambda change: middle(change, density, gamma))
    for preset, vote in (("breadcrumbs", False), ("breadcrumbs_ties", True)):
        (tmp_path / preset).mkdir()
        values = {"density": density, "gamma": gamma, "weights": [0.6, 1.0], "block": 300}
        got = merged(tmp_path / preset, models, get("merge", preset).make(values))
        for name in SHAPES:
            check(got[name], *expected(wanted, name, [0.6, 1.0], vote=vote), dtype)


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.sampled_from([-3.0, -1.0, 0.0, 0.5, 1.0, 3.0, 1e-30]), min_size=1),
    density=st.floats(0.01, 1),
    gamma=st.floats(0, 0.9),
    block=st.integers(1, 12),
)
def test_equal_magnitudes_of_breadcrumbs_count_from_the_lowest_index(values, density, gamma, block):
    change = np.array(values, np.float32)
    method = Arithmetic(sparsify="middle", density=density, gamma=gamma)
    wanted = change * middle(change, density, gamma).astype(np.float32)
    assert np.array_equal(alone(method, change, block), wanted)


def rows_of(method, rows, seed=0, name="w"):
    """What a rule makes of a matrix (rows, columns) as the change of one model."""
    entry = TensorEntry(name, "F32", rows.shape, None, 0)
    tensor = method.rule(1, seed).begin(entry, 1)
    assert tensor.unit == rows.shape[1]
    out = np.empty(rows.size, np.float32)
    tensor.write(Block(0, np.zeros_like(out), rows.reshape(1, -1).copy(), out))
    return out.reshape(rows.shape)


def test_della_keeps_by_rank_in_the_row():
    """The part kept of every rank is its probability, and the mean is kept by rescaling."""
    random = np.random.default_rng(0)
    columns, count, density, eps = 8, 40_000, 0.4, 0.3
    rows = random.permuted(np.tile(np.arange(1.0, columns + 1), (count, 1)), axis=1)
    rows = (rows * random.choice([-1, 1], rows.shape)).astype(np.float32)
    rows *= random.uniform(0.1, 10, (count, 1)).astype(np.float32)  # ranks are of a row
    ranks = np.abs(rows).argsort(1).argsort(1)
    chances = density - eps + 2 * eps * np.arange(columns) / (columns - 1)
    plain = Arithmetic(sparsify="ranked", density=density, epsilon=eps)
    out = rows_of(plain, rows)
    assert np.array_equal(out[out != 0], rows[out != 0])
    kept = np.array([(out[ranks == rank] != 0).mean() for rank in range(columns)])
    assert (np.abs(kept - chances) < 4 * np.sqrt(chances * (1 - chances) / count)).all()
    rescaled = rows_of(Arithmetic(sparsify="ranked", rescale=True, density=0.4, epsilon=0.3), rows)
    np.testing.assert_allclose(rescaled, out / chances[ranks], rtol=1e-6)


def test_della_without_epsilon_is_dare():
    change = np.random.default_rng(1).standard_normal((64, 32)).astype(np.float32)
    for rescale in (False, True):
        ranked = Arithmetic(sparsify="ranked", density=0.5, epsilon=0, rescale=rescale)
        plain = alone(
            Arithmetic(sparsify="random", density=0.5, rescale=rescale), change.ravel(), 99
        )
        assert np.array_equal(rows_of(ranked, change).ravel(), plain)


@pytest.mark.parametrize("dtype", DTYPES)
def test_della_is_what_its_own_draws_make_of_it(tmp_path, dtype):
    """With the kept elements read off single sums, the vote and the mean are the oracle's."""
    models = random_models(2, dtype)
    for preset, vote in (("della_linear", False), ("della", True)):
        (tmp_path / preset).mkdir()
        method = get("merge", preset).make({"density": 0.4, "epsilon": 0.2})
        paths = write(tmp_path / preset, models)
        out = method.merge_folders(paths[0], paths[1:], tmp_path / preset / "out", seed=7)
        got = load_file(out / "model.safetensors")
        drops = Arithmetic(sparsify="ranked", rescale=True, density=0.4, epsilon=0.2).rule(2, 7)
        for name, shape in SHAPES.items():
            base = models[0][name].double()
            dropped = [{name: base}]
            for place in range(2):
                changes = np.zeros((2, base.numel()), np.float32)
                changes[place] = (models[1 + place][name].float() - models[0][name].float()).ravel()
                one = np.empty(base.numel(), np.float32)
                tensor = drops.begin(TensorEntry(name, "F32", shape, None, 0), 2)
                tensor.write(Block(0, np.zeros_like(one), changes, one))
                dropped.append({name: base + torch.from_numpy(one).double().reshape(shape)})
            check(got[name], *expected(dropped, name, [1, 1], vote=vote, normalize=vote), dtype)


def test_float64_models(tmp_path):
    models = random_models(2, torch.float64)
    got = merged(tmp_path, models, get("merge", "ties").make({"density": 0.3}))
    for name in SHAPES:
        wanted, unsure = expected(models, name, [1, 1], 1, 0.3, vote=True, normalize=True)
        assert (np.isclose(got[name].numpy(), wanted, rtol=1e-13) | unsure).all()


def alone(method, change, block, seed=0, base=None):
    """The merged change of one model, block by block, straight through the rule."""
    rule = method.rule(1, seed)
    base = np.zeros_like(change) if base is None else base
    tensor = rule.begin(TensorEntry("w", "F32", change.shape, None, 0), 1)
    out = np.empty_like(change)
    for number in range(tensor.scans + 1):
        for start in range(0, change.size, block):
            cut = slice(start, start + block)
            piece = Block(start, base[cut], change[None, cut].copy(), out[cut])
            tensor.scan(number, piece) if number < tensor.scans else tensor.write(piece)
        if number < tensor.scans:
            tensor.scanned(number)
    return out


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.sampled_from([-3.0, -1.0, 0.0, 0.5, 1.0, 3.0, 1e-30]), min_size=1),
    density=st.floats(0.01, 1),
    block=st.integers(1, 12),
)
def test_equal_magnitudes_stay_from_the_lowest_index_on(values, density, block):
    change = np.array(values, np.float32)
    method = Arithmetic(sparsify="magnitude", density=density)
    wanted = change * largest(change, density).astype(np.float32)
    assert np.array_equal(alone(method, change, block), wanted)


def test_exactly_the_asked_count_stays_of_bfloat16_steps():
    random = np.random.default_rng(0)
    steps = random.integers(-20, 20, 50_000).astype(np.float32)
    steps[steps == 0] = 1
    for density in (0.001, 0.3, 0.5):
        out = alone(Arithmetic(sparsify="magnitude", density=density), steps, 4096)
        assert np.count_nonzero(out) == int(density * steps.size)


def test_random_choice_keeps_its_part_and_its_mean():
    n, density = 200_000, 0.3
    change = np.ones(n, np.float32)
    total = np.zeros(n)
    for seed in range(10):
        method = Arithmetic(sparsify="random", rescale=True, density=density)
        out = alone(method, change, 5000, seed)
        assert set(np.unique(out)) == {np.float32(0), np.float32(1 / density)}
        sigma = (density * (1 - density) / n) ** 0.5
        assert abs(np.count_nonzero(out) / n - density) < 4 * sigma
        total += out
    deviation = ((1 - density) / density / (10 * n)) ** 0.5
    assert abs(total.mean() / 10 - 1) < 4 * deviation
    # seeds are independent: the number kept per element is binomial
    counts = np.bincount(np.round(total * density).astype(int), minlength=11) / n
    assert abs(counts[3] - 0.26683) < 4 * (0.267 * 0.733 / n) ** 0.5


def test_random_choice_differs_by_seed_tensor_and_place():
    change = np.ones(4096, np.float32)
    method = Arithmetic(sparsify="random", density=0.5)

    def kept(seed, name, place):
        rule = method.rule(2, seed).begin(TensorEntry(name, "F32", (4096,), None, 0), 2)
        models = np.zeros((2, 4096), np.float32)
        models[place] = change
        out = np.empty_like(change)
        rule.write(Block(0, np.zeros_like(change), models, out))
        return out

    first = kept(0, "a", 0)
    for other in (kept(1, "a", 0), kept(0, "b", 0), kept(0, "a", 1)):
        assert abs((first == other).mean() - 0.5) < 4 * 0.5 / 4096**0.5
    assert np.array_equal(first, kept(0, "a", 0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dare_is_what_its_own_draws_make_of_it(tmp_path, dtype):
    """With the masks read off a probe, the sum and the vote are those of the oracle."""
    models = random_models(2, dtype)
    probes = {name: np.ones(int(np.prod(shape)), np.float32) for name, shape in SHAPES.items()}
    for preset, vote in (("dare_linear", False), ("dare_ties", True)):
        method = get("merge", preset).make({"density": 0.4})
        (tmp_path / preset).mkdir()
        paths = write(tmp_path / preset, models)
        out = method.merge_folders(paths[0], paths[1:], tmp_path / preset / "out", seed=7)
        got = load_file(out / "model.safetensors")
        drops = Arithmetic(sparsify="random", rescale=True, density=0.4).rule(2, 7)
        for name, ones in probes.items():
            masks = []
            for place in range(2):
                probe = np.zeros((2, ones.size), np.float32)
                probe[place] = ones
                out = np.empty_like(ones)
                tensor = drops.begin(TensorEntry(name, "F32", (ones.size,), None, 0), 2)
                tensor.write(Block(0, np.zeros_like(ones), probe, out))
                masks.append(torch.from_numpy(out).reshape(SHAPES[name]).double())
            base = models[0][name].double()
            dropped = [{name: base}]
            for mask, model in zip(masks, models[1:], strict=True):
                dropped.append({name: base + mask * (model[name].double() - base)})
            check(got[name], *expected(dropped, name, [1, 1], vote=vote), dtype)


@pytest.mark.parametrize(
    "preset", [name for name in PRESETS if name not in ("average", "task_arithmetic")]
)
def test_all_of_one_model_is_that_model(tmp_path, preset):
    models = random_models(1, torch.bfloat16)
    got = merged(tmp_path, models, get("merge", preset).make({"density": 1.0}))
    assert all(torch.equal(got[name], models[1][name]) for name in SHAPES)


def test_no_change_keeps_the_base_to_the_bit(tmp_path):
    models = random_models(1, torch.bfloat16)
    models = [models[0]] * 3
    for preset in PRESETS:
        (tmp_path / preset).mkdir()
        got = merged(tmp_path / preset, models, get("merge", preset).make())
        for name in SHAPES:
            assert torch.equal(got[name], models[0][name])


def test_nan_is_found_in_the_output_and_named(tmp_path):
    models = random_models(2, torch.bfloat16)
    models[1]["norm.weight"][3] = float("nan")
    for preset in ("average", "task_arithmetic", "ties"):
        (tmp_path / preset).mkdir()
        with pytest.raises(InputError, match=r"model1: tensor 'norm.weight' .* at element 3, "):
            merged(tmp_path / preset, models, get("merge", preset).make({"weights": [1, 2]}))


def test_the_table_is_the_registry():
    listed = {entry.name: entry for entry in methods("merge")}
    for name, row in PRESETS.items():
        assert listed[name].summary == row["summary"]
        assert isinstance(listed[name].make(), Arithmetic)
        assert not listed[name].make().model_fields_set - set(row)
    assert all(explain(Arithmetic, key) for key in Arithmetic.model_fields)


@pytest.mark.parametrize(
    ("values", "models", "sentence"),
    [
        ({}, 0, "nothing to merge: give at least one delta"),
        ({"weights": [1.0]}, 2, "1 weights for 2 deltas; give one for each"),
        ({"weights": [1.0, -1.0], "normalize": True}, 2, "the weights sum to zero"),
        ({"rescale": True}, 1, "belongs to sparsify=random or ranked; set rescale=false"),
        ({"sparsify": "ranked", "density": 0.1}, 1, "-/\\+ epsilon = -0.05, 0.25 are no prob"),
        ({"density": 0.0}, 1, "density = 0.0: .*greater than 0"),
        ({"density": 1.5}, 1, "density = 1.5: .*less than or equal to 1"),
        ({"densty": 0.5}, 1, "unknown key 'densty'; did you mean 'density'?"),
    ],
)
def test_bad_settings(values, models, sentence):
    with pytest.raises(InputError, match=sentence):
        get("merge", "task_arithmetic").make(values).rule(models)


def test_the_verb_writes_a_model_that_is_a_delta(tmp_path):
    from deltaloom.core.base import Base
    from deltaloom.core.delta import load
    from deltaloom.core.run import Run

    models = random_models(2, torch.float32)
    paths = write(tmp_path, models)
    base = Base(model=str(paths[0]))
    one, two = (load(path, base) for path in paths[1:])
    method = get("merge", "task_arithmetic").make({"scale": 0.5})
    with Run.open(tmp_path / "run", {"merge": {}}, {}) as run:
        delta = method.merge(base, [one, 2.0 * two], run)  # the second lives only in memory
        run.finish()
    for name in SHAPES:
        wanted = 0.5 * one.to_dense(name) + two.to_dense(name)
        torch.testing.assert_close(delta.to_dense(name), wanted, rtol=1e-4, atol=1e-5)
    assert json.loads((tmp_path / "run" / "delta.json").read_text())["kind"] == "dense"
    assert not (tmp_path / "run" / ".work").exists()
