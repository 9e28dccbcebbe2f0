"""mergekit's rounding, beside torch on whole tensors in the models' own format."""

import numpy as np
import pytest
import torch
from folders import loaded, random_models, write

from deltaloom.core.errors import InputError
from deltaloom.merge._compat import build
from deltaloom.merge._compat_kernels import coarsen
from deltaloom.merge._compat_numbers import Numbers, common
from deltaloom.merge._compat_reduce import Reduction, down, whole
from deltaloom.merge._dialect import dialect, dialects
from deltaloom.merge._kernels import GROUP, draw
from deltaloom.merge._order import Quantiles
from deltaloom.merge._rules import _key
from deltaloom.merge._stream import merge_folders

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
INTEGERS = {2: torch.int16, 4: torch.int32}
COUNTS = (1, 3, 5, 8, 31, 100, 4097, 9001)


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


def same_bits(got, wanted):
    kind = INTEGERS[wanted.element_size()]
    return torch.equal(got.view(kind), wanted.view(kind))


@pytest.mark.parametrize(("kind", "dtype"), [(1, torch.bfloat16), (2, torch.float16)])
def test_rounding_is_torchs(kind, dtype):
    draws = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (500_000,), generator=draws).to(torch.int32)
    values = torch.cat([bits.view(torch.float32), torch.randn(100_000) * 1e-5])
    near = torch.arange(2**16).to(torch.int16).view(dtype).float()  # and all ties between two
    near = near[near.isfinite()].sort().values
    values = torch.cat([values, near, (near[1:].double() + near[:-1].double()).float() / 2])
    wanted = values.to(dtype).float()
    got = values.numpy().copy()
    coarsen(got, kind)
    got = torch.from_numpy(got)
    number = ~values.isnan()
    assert same_bits(got[number], wanted[number])
    assert got[~number].isnan().all()


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("cut", [32, 96, 10**6])
def test_sums_and_norms_are_torchs(count, cut):
    torch.set_num_threads(1)
    values = torch.randn(count, generator=torch.Generator().manual_seed(count))
    for squares in (False, True):
        one = Reduction(count, count, np.float32, squares=squares)
        for start in range(0, count, cut):
            one.add(values.numpy()[start : start + cut], start)
        got = np.sqrt(one.sums[0]) if squares else one.sums[0]
        assert got == (torch.linalg.vector_norm(values) if squares else values.sum()).item()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_ends_of_norms_are_torchs(dtype):
    torch.set_num_threads(1)
    draws = torch.Generator().manual_seed(0)
    lanes = 1 if dtype == torch.float16 else 8
    for count in range(1, 41):
        values = torch.rand(60, count, generator=draws).to(dtype)
        rows = Reduction(count, values.numel(), np.float32, squares=True, lanes=lanes)
        rows.add(values.float().numpy().ravel(), 0)
        got = torch.from_numpy(np.sqrt(rows.sums)).to(dtype)
        wanted = torch.stack([torch.linalg.vector_norm(row) for row in values])
        assert same_bits(got, wanted), count


def test_long_norms_of_float16_are_torchs():
    torch.set_num_threads(1)
    for seed in range(3):
        draws = torch.Generator().manual_seed(seed)
        values = torch.randn(1_100_003, generator=draws).half()
        one = Reduction(values.numel(), values.numel(), np.float32, squares=True, lanes=1)
        one.add(values.float().numpy(), 0)
        assert np.float16(np.sqrt(one.sums[0])) == torch.linalg.vector_norm(values).numpy()


@pytest.mark.parametrize("scale", [1.0, 1e-38])
def test_quantiles_are_those_of_a_sort(scale):
    values = np.random.default_rng(0).standard_normal(3001).astype(np.float32) * np.float32(scale)
    values[::7] = values[1]  # equal ones
    values[5], values[6], values[8:12] = np.inf, -np.inf, [0.0, -0.0, np.nan, -np.nan]
    places = [0, 1, 750, 1500, 1501, 2998, 2997]
    found = Quantiles(places)
    for number in range(2):
        for start in range(0, values.size, 1000):
            found.count(number, values[start : start + 1000])
        found.counted(number)
    assert found.values.tolist() == np.sort(values)[places].tolist()


def test_sums_of_rows_and_of_pieces():
    torch.set_num_threads(1)
    values = torch.randn(37, 45, generator=torch.Generator().manual_seed(0))
    rows = Reduction(45, values.numel(), np.float32)
    rows.add(values.numpy().ravel(), 0)
    assert rows.sums.tolist() == values.sum(-1).tolist()
    assert down(values.numpy(), plain=False).tolist() == values.T.contiguous().sum(0).tolist()
    pieces = Reduction(1024, values.numel(), np.float32)
    pieces.add(values.numpy().ravel(), 0)
    assert pieces.sums.tolist() == [one.sum().item() for one in values.flatten().split(1024)]
    assert whole(values[0].numpy()) == values[0].sum().item()


def test_types_are_promoted_as_torch_does():
    for one in DTYPES:
        for other in DTYPES:
            wanted = name_of(torch.promote_types(one, other))
            assert common([name_of(one), name_of(other)]) == wanted


def uniform(name, count, place, seed):
    words = np.empty((4, GROUP), np.uint64)
    parts = []
    for group in range(-(-count // (4 * GROUP))):
        draw(group, *_key(seed, name, place), words)
        parts.append(words.ravel().copy())
    return torch.from_numpy(np.concatenate(parts)[:count].astype(np.float64) / 2**32)


def kept(how, change, one, draws):
    """What stays of a change, in torch; the formula of the published semantics."""
    n, density = change.numel(), one["density"]
    flat = change.flatten()
    if density >= 1:
        return change
    mask = torch.zeros_like(flat)
    if how == "magnitude":
        best = flat.abs().float().argsort(descending=True, stable=True)
        mask[best[: max(1, int(density * n))]] = 1
    elif how == "middle":
        count = int(density * n)
        low = max(0, n - count - int(one["gamma"] * n))
        mask[flat.abs().float().argsort(stable=True)[low : low + count]] = 1
    else:
        wide = torch.bfloat16 if change.dtype == torch.bfloat16 else torch.float32
        chance = torch.full((n,), density, dtype=wide).double()
        if how == "ranked":
            table = change.reshape(1, -1) if change.dim() < 2 else change.reshape(change.shape)
            if table.dim() == 0 or table.shape[1] == 1:
                return None
            rank = table.abs().argsort(dim=1, stable=True).argsort(dim=1).to(wide) + 1
            low, high = rank.amin(1, keepdim=True), rank.amax(1, keepdim=True)
            steps = (rank - low) / (high - low) * 2 * one["epsilon"]
            chance = (steps + (density - one["epsilon"])).double().flatten()
        mask = (draws < chance).to(wide)
        flat = flat.to(wide)
    left = flat * mask
    if one["rescale"]:
        before, after = flat.abs().sum(), left.abs().sum()
        if not (before < 1e-7 or after < 1e-7):
            left = left * (before / after)
    return left.to(change.dtype).reshape(change.shape)


def family(method, base, models, shared, each, name, seed):
    """Task arithmetic and its kin on whole tensors in torch."""
    from deltaloom.core.registry import get

    row = get("merge", method).preset
    changes = []
    for i, (model, one) in enumerate(zip(models, each, strict=True)):
        change = model - base
        draws = uniform(name, change.numel(), i, seed)
        one = {**one, "rescale": shared["rescale"]}
        if (how := row.get("sparsify", "none")) != "none":
            change = kept(how, change, one, draws)
        if change is None:
            return None
        changes.append(change * torch.tensor(one["weight"], dtype=base.dtype))
    changes = torch.stack(changes)
    weights = torch.tensor([one["weight"] for one in each], dtype=base.dtype)
    weights = weights.reshape(-1, *[1] * base.dim())
    total = changes.sum(0)
    if row.get("consensus"):
        agrees = torch.where(total >= 0, 1, -1) == changes.sign()
        total, mass = (changes * agrees).sum(0), (weights * agrees).sum(0)
        mass = torch.where(mass == 0, 1, mass)
    else:
        mass = weights.sum(0)
        mass = torch.where(mass.abs() < 1e-8, 1, mass)
    if shared["normalize"]:
        total = total / mass
    return base + total * shared["lambda"]


def rule_of(method, dtype, each, seed=3, base=True, finer=False, **shared):
    one = dialect(method, "c")
    values = {p.name: p.default for p in one.shared} | shared
    own = {p.name: p.default for p in one.own}
    numbers = Numbers(name_of(dtype), finer=finer)
    rows = [{**own, **some} for some in each]
    return build(method, values, rows, base, seed, numbers), values, rows


def run(folder, models, rule, **how):
    folder.mkdir(parents=True)
    base, *others = write(folder, models)
    return loaded(merge_folders(base, others, rule, folder / "out", **{"block": 256, **how}))


EACH = [{"weight": 0.3, "density": 0.7}, {"weight": 0.77, "density": 0.33}, {"weight": -0.2}]
FAMILY = ("task_arithmetic", "ties", "breadcrumbs", "breadcrumbs_ties")
DRAWN = ("dare_linear", "dare_ties", "della_linear", "della")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", FAMILY + DRAWN)
def test_changes_are_torchs_to_the_bit(tmp_path, method, dtype):
    torch.set_num_threads(1)
    models = random_models(3, dtype)
    models[0]["norm.weight"][:4] = torch.tensor([0.0, -0.0, -0.0, 0.0]).to(dtype)
    for more in ({}, {"lambda": 0.7, "normalize": True}, {"rescale": True, "int8_mask": True}):
        rule, shared, each = rule_of(method, dtype, EACH, **more)
        got = run(tmp_path / str(more), models, rule)
        for name, base in models[0].items():
            if not base.numel():
                continue
            others = [model[name] for model in models[1:]]
            wanted = family(method, base, others, shared, each, name, 3)
            assert wanted is None or same_bits(got[name], wanted), (name, more)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weights", [(0.3,), (0.3, 0.9), (0.1, 0.7, 1 / 3)])
def test_a_weighted_sum_adds_unrounded_products(tmp_path, dtype, weights):
    models = random_models(len(weights), dtype)
    rule, *_ = rule_of("linear", dtype, [{"weight": w} for w in weights], base=False)
    got = run(tmp_path / "a", models, rule)
    for name, base in models[0].items():
        total = np.zeros(base.shape, np.float32)
        for model, weight in zip(models[1:], weights, strict=True):
            wide = model[name].double().numpy() * np.float64(np.float32(weight))
            total = (total + wide).astype(np.float32)  # float64 holds the product
        divisor = np.float32(0)
        for weight in weights:
            divisor = divisor + np.float32(weight)
        wanted = torch.from_numpy(np.asarray(total / divisor)).to(dtype)
        assert same_bits(got[name], wanted), name


def test_inputs_are_rounded_when_they_are_read(tmp_path):
    models = random_models(2, torch.float32)
    rule, shared, each = rule_of("ties", torch.bfloat16, EACH[:2], finer=True)
    got = run(tmp_path / "a", models, rule, dtype="bfloat16")
    for name, base in models[0].items():
        if not base.numel():
            continue
        others = [model[name].bfloat16() for model in models[1:]]
        wanted = family("ties", base.bfloat16(), others, shared, each, name, 3)
        assert same_bits(got[name], wanted), name


SETTINGS = {
    "linear": [{"weight": 0.3}, {"weight": 0.9}, {"weight": 0.4}],
    "multislerp": [{"weight": 0.3}, {"weight": 0.9}, {"weight": 0.4}],
    "nuslerp": [{"weight": 0.3}, {"weight": 0.9}],
    "passthrough": [{"scale": 0.7}],
    **{method: EACH for method in DRAWN + FAMILY},
    **{method: [{}, {}] for method in ("slerp", "nearswap", "arcee_fusion")},
}
SHARED = {"slerp": {"t": 0.3}, "nearswap": {"t": 0.05}, "sce": {"select_topk": 0.3}}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", sorted(dialects()))
def test_blocks_and_threads_change_no_byte_and_float64_is_near(tmp_path, method, dtype):
    each = SETTINGS.get(method, [{}] * 3)
    models = random_models(len(each), dtype)
    for model in models:
        model["w.weight"] = torch.cat([model["w.weight"]] * 3)  # several blocks of 32 and more
    rule, *_ = rule_of(method, dtype, each, **SHARED.get(method, {}))
    first = run(tmp_path / "a", models, rule, block=256, threads=2)
    other = run(tmp_path / "b", models, rule, block=10**6, threads=1)
    for name, one in first.items():
        assert same_bits(one, other[name]), name
    wide, *_ = rule_of(method, torch.float64, each, **SHARED.get(method, {}))
    exact = run(tmp_path / "c", [{n: t.double() for n, t in m.items()} for m in models], wide)
    away = torch.cat([(exact[n] - t.double()).flatten() for n, t in first.items()])
    eps = torch.finfo(dtype).eps
    near = (away.abs() <= 40 * eps).double().mean()  # choices may turn, the rest is rounding
    assert near >= (0.97 if dtype == torch.float32 else 0.8), near


def arc(t, a, b):
    """SLERP in float32 over pieces of a million elements, in torch; rounded to the format once."""
    kind, a, b = a.dtype, a.float().flatten(), b.float().flatten()
    norm = torch.linalg.vector_norm
    lengths = [norm(torch.stack([norm(p) for p in one.split(1 << 20)])) for one in (a, b)]
    x, y = a / lengths[0], b / lengths[1]
    pieces = zip(x.split(1 << 20), y.split(1 << 20), strict=True)
    cosine = torch.stack([(p * q).sum() for p, q in pieces]).sum()
    t, angle = torch.tensor(t), torch.acos(cosine)
    left, right = torch.sin((1 - t) * angle), torch.sin(t * angle)
    return (left / torch.sin(angle) * a + right / torch.sin(angle) * b).to(kind)


def arcs_of_rows(t, a, b):
    """NuSLERP along the last axis, in torch in the models' format."""
    units = [one / one.norm(dim=-1, keepdim=True).clamp(min=1e-7) for one in (a, b)]
    cosine = (units[0] * units[1]).sum(-1, keepdim=True).clamp(-1, 1)
    angle = torch.acos(cosine)
    return (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)


@pytest.mark.parametrize("dtype", DTYPES)
def test_slerp_is_torchs_to_the_bit(tmp_path, dtype):
    torch.set_num_threads(1)
    models = [*random_models(2, dtype, step=1.0)]
    draws = torch.Generator().manual_seed(0)
    for model in models:  # two pieces, with a tail of 6
        model["long"] = torch.randn((1 << 20) + 38, generator=draws).to(dtype)
    rule, *_ = rule_of("slerp", dtype, [{}, {}], t=0.3)
    got = run(tmp_path / "a", models, rule, block=1 << 18)
    for name in ("w.weight", "long"):
        wanted = arc(0.3, models[1][name], models[2][name]).reshape(got[name].shape)
        assert same_bits(got[name], wanted), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [13, 38, 700])
def test_nuslerp_of_rows_is_torchs_to_the_bit(tmp_path, dtype, columns):
    torch.set_num_threads(1)
    draws = torch.Generator().manual_seed(columns)
    models = [{"w": torch.randn(300, columns, generator=draws).to(dtype)} for _ in range(3)]
    rows = [{"weight": 0.25}, {"weight": 0.75}]
    rule, *_ = rule_of("nuslerp", dtype, rows, nuslerp_flatten=False, base=False)
    got = run(tmp_path / "a", models, rule)["w"]
    assert same_bits(got, arcs_of_rows(0.75, models[1]["w"], models[2]["w"]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("step", [0.03, 1e-4])
def test_arcee_fusion_is_torchs_to_the_bit(tmp_path, dtype, step):
    torch.set_num_threads(1)
    draws = torch.Generator().manual_seed(0)
    first = torch.randn(150, 77, generator=draws)
    second = (first + step * torch.randn(150, 77, generator=draws)).to(dtype)
    first = first.to(dtype)
    rule, *_ = rule_of("arcee_fusion", dtype, [{}, {}])
    models = [{"w": one} for one in (first, first, second)]
    got = run(tmp_path / "a", models, rule, dtype="float32")["w"]
    p, q = (one.softmax(-1) + 1e-8 for one in (second, first))
    apart = (p * torch.log(p / q)).sum(-1, keepdim=True)
    assert step > 0.01 or dtype == torch.float16 or (apart < 0).any()  # by rounding
    importance = (second - first).abs() * apart
    ordered = importance.flatten().sort().values
    low, median, high = ordered[(torch.tensor([0.25, 0.5, 0.75]) * (ordered.numel() - 1)).long()]
    chosen = (importance >= median + 1.5 * (high - low)).float()
    assert same_bits(got, first + (second - first) * chosen)


def test_one_inner_product_of_karcher_is_torchs(tmp_path):
    """In float32 a BLAS's rounding shows: one step from the first towards the mean."""
    torch.set_num_threads(1)
    draws = torch.Generator().manual_seed(0)
    models = [{"w": torch.randn(69_701, generator=draws)} for _ in range(3)]
    rule, *_ = rule_of("karcher", torch.float32, [{}, {}], max_iter=1)
    got = run(tmp_path / "a", models, rule)["w"]
    sizes = [model["w"].norm() for model in models[1:]]
    units = [model["w"] / size for model, size in zip(models[1:], sizes, strict=True)]
    mean = 0.5 * units[0] + 0.5 * units[1]
    mean = mean / mean.norm()
    tangent = torch.zeros_like(mean)
    for unit in units:
        cosine = torch.dot(mean, unit)
        angle = torch.arccos(cosine)
        tangent += 0.5 * (angle / torch.sin(angle)) * (unit - cosine * mean)
    size = tangent.norm()
    if size >= 1e-5:
        mean = torch.cos(size) * mean + torch.sin(size) * (tangent / size)
        mean = mean / mean.norm()
    assert same_bits(got, (0.5 * sizes[0] + 0.5 * sizes[1]) * mean)


def test_ram_counts_who_changed_what(tmp_path):
    base = {"w": torch.zeros(4)}
    models = [base, {"w": torch.tensor([1.0, 2, 0, 1e-6])}, {"w": torch.tensor([3.0, 0, 4, 0])}]
    rule, *_ = rule_of("ram", torch.float32, [{}, {}])
    assert run(tmp_path / "a", models, rule)["w"].tolist() == [2, 2, 4, 0]
    rule, *_ = rule_of("ramplus_tl", torch.float32, [{}, {}], r=0.5, alpha=0.8)
    assert (
        run(tmp_path / "b", models, rule)["w"].tolist() == [2, 2 * 1.4, 4 * 1.4, 0]
        or (run(tmp_path / "c", models, rule)["w"] - torch.tensor([2, 2.8, 5.6, 0])).abs().max()
        < 1e-6
    )


def test_what_cannot_be():
    with pytest.raises(InputError, match="sum to zero"):
        rule_of("linear", torch.float32, [{"weight": 1.0}, {"weight": -1.0}])
    with pytest.raises(InputError, match="set a smaller epsilon"):
        rule_of("della", torch.float32, [{"weight": 1.0, "density": 0.1}])
