"""The algebra of deltas, against PEFT and plain arithmetic on the same folders."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from changes import (
    CONFIG,
    WEIGHTS,
    added,
    agree,
    combined,
    dense,
    merged,
    trained_in,
    tuned_in,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from small import logits

from deltaloom.core.base import Base
from deltaloom.core.delta import load
from deltaloom.core.deltas.sparse import Elements, Sparse

# PEFT's advice on tied weights and flags, and a deprecation inside transformers.
pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning:peft", "ignore::FutureWarning:transformers"
)

EVERY = ["q_proj", "o_proj", "up_proj", "down_proj"]
PATTERNS = {"rank_pattern": {"up_proj": 5}, "alpha_pattern": {r"layers\.1\..*q_proj": 11}}
ADAPTERS = {
    "lora": {"seed": 1},
    "rslora": {"seed": 2, "r": 3, "lora_alpha": 7, "use_rslora": True, "target_modules": EVERY},
    "patterns": {"seed": 3, "r": 4, "target_modules": EVERY, **PATTERNS},
    "dora": {"seed": 4, "use_dora": True, "use_rslora": True, "target_modules": EVERY},
    "biases": {"seed": 5, "bias": "all", "target_modules": ["q_proj", "lm_head"]},
    "beside": {"seed": 6, "r": 3, "lora_bias": True, "target_modules": ["q_proj", "v_proj"]},
    "whole": {"seed": 7, "modules_to_save": ["lm_head", "input_layernorm"]},
}
KINDS = [*ADAPTERS, "model", "stored", "sparse"]
LOWRANK = len(ADAPTERS)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny Llama with biases and an output layer of its own."""
    import tiny

    folder = tmp_path_factory.mktemp("base") / "biased"
    return Base(
        model=str(tiny.base_in(folder, seed=4, attention_bias=True, tie_word_embeddings=False))
    )


@pytest.fixture(scope="module")
def tuned(base, tmp_path_factory):
    """A whole tuned model, as Trainer leaves it."""
    return tuned_in(tmp_path_factory.mktemp("tuned") / "model", base)


@pytest.fixture(scope="module")
def folders(base, tmp_path_factory):
    """An adapter of every kind, saved by PEFT."""
    home = tmp_path_factory.mktemp("adapters")
    return {name: trained_in(home / name, base, **c) for name, c in ADAPTERS.items()}


@pytest.fixture(scope="module")
def pool(base, folders, tuned, tmp_path_factory):
    """Deltas of each kind with the change that each is, by an oracle of its own."""
    found = [(load(folder, base), merged(folder, base)) for folder in folders.values()]
    own, theirs = (load_file(Path(f) / "model.safetensors") for f in (tuned, base.model))
    change = {name: own[name].double() - theirs[name].double() for name in own}
    found.append((load(tuned, base), change))
    stored = tmp_path_factory.mktemp("stored")
    found[-1][0].save(stored)
    found.append((load(stored, base), change))
    few = scattered(base)
    found.append((few, {name: by_hand(own) for name, own in few.elements.items()}))
    assert [delta.kind for delta, _ in found] == ["lowrank"] * LOWRANK + ["dense"] * 2 + ["sparse"]
    return found


def scattered(base):
    """A few elements, half of them of tensors that other kinds change too."""
    generator = torch.Generator().manual_seed(8)
    elements = {}
    for name, shape in {
        "lm_head.weight": (23, 16),
        "model.layers.0.self_attn.q_proj.bias": (16,),
        "model.layers.1.mlp.up_proj.weight": (24, 16),
    }.items():
        size = shape[0] * (shape[1] if len(shape) == 2 else 1)
        indices = torch.randperm(size, generator=generator)[: size // 4].sort().values
        elements[name] = Elements(indices, torch.randn(len(indices), generator=generator), shape)
    return Sparse(base, elements)


def by_hand(own):
    change = torch.zeros(own.shape, dtype=torch.float64).flatten()
    for index, value in zip(own.indices.tolist(), own.values.tolist(), strict=True):
        change[index] += value
    return change.reshape(own.shape)


WHICH = st.integers(0, len(KINDS) - 1)
FACTOR = st.floats(-2, 2, allow_subnormal=False).map(lambda f: round(f, 3))
SUM = st.lists(st.tuples(FACTOR, WHICH), min_size=1, max_size=4)


def built(pool, drawn):
    """A weighted sum by the algebra and by the oracle."""
    total = None
    for factor, which in drawn:
        part = factor * pool[which][0]
        total = part if total is None else total + part
    return total, combined([(factor, pool[which][1]) for factor, which in drawn])


# Laws.


@given(WHICH)
def test_each_kind_is_what_its_oracle_says(pool, which):
    delta, wanted = pool[which]
    assert delta.names() == sorted(wanted)
    agree(dense(delta), wanted)
    for name in delta.names():
        assert delta.shape(name) == tuple(wanted[name].shape)
        assert delta.to_dense(name).dtype == torch.float32


@given(SUM)
def test_one_times_a_delta_is_itself_bit_for_bit(pool, drawn):
    delta, _ = built(pool, drawn)
    agree(dense(1 * delta), dense(delta), close=False)
    agree(dense(delta * 1.0), dense(delta), close=False)


@given(SUM, WHICH)
def test_adding_nothing_changes_nothing(pool, drawn, which):
    delta, _ = built(pool, drawn)
    agree(dense(delta + 0 * pool[which][0]), dense(delta), close=False)


@given(SUM)
def test_sums_and_multiples_of_any_kinds_are_the_plain_ones(pool, drawn):
    delta, wanted = built(pool, drawn)
    agree(dense(delta), wanted)
    agree(dense(-delta), combined([(-1, wanted)]))
    kinds = {pool[which][0].kind for _, which in drawn}
    assert delta.kind == (kinds.pop() if len(kinds) == 1 else "dense")


@given(FACTOR, WHICH, WHICH)
def test_multiples_of_sums_are_sums_of_multiples(pool, factor, a, b):
    first, second = pool[a][0], pool[b][0]
    agree(dense(factor * (first + second)), dense(factor * first + factor * second))


@given(WHICH, WHICH)
def test_what_was_added_can_be_taken_away(pool, a, b):
    (first, _), (second, _) = pool[a], pool[b]
    agree(dense((first + second) - second), dense(first))
    agree(dense(first + second), dense(second + first))
    rest = (first + second) - (second + first)
    assert isinstance(rest.norm(), float)
    assert rest.norm() < 1e-4 * (1 + first.norm() + second.norm())


@settings(max_examples=40)
@given(SUM, SUM)
def test_dot_and_norm_agree_with_dense(pool, a, b):
    (left, u), (right, v) = built(pool, a), built(pool, b)
    wanted = float(sum((u[name] * v[name]).sum() for name in u.keys() & v.keys()))
    size = (
        sum((t**2).sum() for t in u.values()) ** 0.5,
        sum((t**2).sum() for t in v.values()) ** 0.5,
    )
    scale = float(size[0] * size[1])
    assert left.dot(right) == pytest.approx(wanted, abs=1e-6 * scale + 1e-12)
    assert left.dot(right) == pytest.approx(right.dot(left), abs=1e-6 * scale + 1e-12)
    assert left.norm() == pytest.approx(float(size[0]), rel=1e-5, abs=1e-6)


def test_ranks_add(pool):
    total = pool[0][0] + pool[1][0] + 2 * pool[2][0]
    ranks = {name: own.a.shape[0] for name, own in total.factors.items()}
    assert ranks["model.layers.0.self_attn.q_proj.weight"] == 2 + 3 + 4
    assert ranks["model.layers.0.mlp.up_proj.weight"] == 3 + 5
    assert ranks["model.layers.0.mlp.down_proj.weight"] == 3 + 4
    doubled = pool[KINDS.index("dora")][0] + pool[0][0]
    assert {own.a.shape[0] for own in doubled.factors.values()} == {2, 4}


# Disk.


@pytest.mark.parametrize("which", KINDS)
def test_saved_and_loaded_untouched(pool, base, tmp_path, which):
    delta, _ = pool[KINDS.index(which)]
    delta.save(tmp_path / "d")
    again = load(tmp_path / "d", base)
    assert again.kind == delta.kind
    agree(dense(again), dense(delta), close=False)
    about = json.loads((tmp_path / "d" / "delta.json").read_text())
    assert about["base"]["fingerprint"] == base.fingerprint()


# PEFT 0.21.2's add_weighted_adapter([a], [1.0]) gives back another model, with all of its exact
# combinations, for rsLoRA, DoRA, lora_bias and modules_to_save, and refuses bias="all"; what it
# gives for rank patterns does not load again.
@pytest.mark.parametrize("kind", ADAPTERS)
def test_one_adapter_at_weight_one_comes_back_byte_for_byte(folders, base, tmp_path, kind):
    folder = folders[kind]
    (1.0 * load(folder, base)).save(tmp_path / "d")
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / "d" / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_combination_is_an_adapter_that_peft_reads(folders, pool, base, tmp_path, kind):
    delta, wanted = pool[KINDS.index(kind)]
    (0.25 * delta + 0.75 * delta).save(tmp_path / "d")
    agree(merged(tmp_path / "d", base), wanted)
    by_peft = logits(delta.apply(base))
    torch.testing.assert_close(logits(load(tmp_path / "d", base).apply(base)), by_peft)


@given(a=st.integers(0, LOWRANK - 1), b=st.integers(0, LOWRANK - 1), factor=FACTOR)
@settings(max_examples=30)
def test_adapters_of_any_two_kinds_make_one_that_peft_reads(
    pool, base, tmp_path_factory, a, b, factor
):
    folder = tmp_path_factory.mktemp("d")
    total, wanted = built(pool, [(1.0, a), (factor, b)])
    total.save(folder)
    agree(merged(folder, base), wanted)


def test_saving_where_it_lies_changes_nothing(llama, adapter, tmp_path):
    shutil.copytree(adapter(), tmp_path / "d")
    before = (tmp_path / "d" / WEIGHTS).read_bytes()
    load(tmp_path / "d", llama).save(tmp_path / "d")
    assert (tmp_path / "d" / WEIGHTS).read_bytes() == before


@settings(max_examples=25)
@given(drawn=SUM)
def test_saved_and_loaded_sums(pool, base, tmp_path_factory, drawn):
    folder = tmp_path_factory.mktemp("d")
    delta, wanted = built(pool, drawn)
    delta.save(folder)
    agree(dense(load(folder, base)), dense(delta))
    agree(dense(load(folder, base)), wanted)


def test_a_combined_adapter_is_peft_s_own_and_gives_the_logits_of_the_sum(pool, base, tmp_path):
    from peft import PeftModel

    delta, wanted = built(pool, [(1.0, 0), (-0.5, 1), (0.75, 2)])
    delta.save(tmp_path / "d")
    by_peft = logits(PeftModel.from_pretrained(base.load(), tmp_path / "d").eval())
    by_hand = logits(added(base, wanted))
    torch.testing.assert_close(by_peft, by_hand, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(delta.apply(base)), by_hand, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(by_hand, logits(base.load()), atol=1e-2)
    agree(merged(tmp_path / "d", base), wanted)


@pytest.mark.parametrize(
    "drawn",
    [
        *([(1.0, which)] for which in range(len(KINDS))),
        [(0.5, 7), (-1.0, 1)],
        [(0.5, 8), (0.5, 7)],
        [(0.5, 9), (0.5, 3)],
    ],
)
def test_apply_is_addition(pool, base, drawn):
    delta, wanted = built(pool, drawn)
    model = delta.apply(base)
    assert not model.training
    torch.testing.assert_close(logits(model), logits(added(base, wanted)), rtol=1e-4, atol=1e-5)


def test_adding_to_bfloat16_rounds_once(pool, base):
    delta, wanted = built(pool, [(0.5, 7), (0.25, 8)])
    half = base.model_copy(update={"dtype": "bfloat16"})
    found, own = delta.apply(half).state_dict(), half.load().state_dict()
    for name, change in wanted.items():
        exact = (own[name].float() + change.float()).bfloat16()
        assert (found[name] != exact).float().mean() < 0.01  # order of the float32 sum


FULL = """
import resource, signal, sys, torch
from deltaloom.core.base import Base
from deltaloom.core.delta import load
base = Base(model=sys.argv[1])
delta = 0.5 * load(sys.argv[2], base)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))
try:
    from pathlib import Path
    delta.save(Path(sys.argv[3]))
except Exception as error:
    print("failed")
"""


@pytest.mark.parametrize("kind", ["lowrank", "dense", "sparse"])
def test_a_disk_that_fills_up_leaves_the_previous_delta(base, folders, tuned, tmp_path, kind):
    folder, source = tmp_path / "d", tmp_path / "source"
    (scattered(base) if kind == "sparse" else load(tuned, base)).save(source)
    source = folders["rslora"] if kind == "lowrank" else source
    (1.5 * load(source, base)).save(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    done = subprocess.run(
        [sys.executable, "-c", FULL, base.model, str(source), str(folder)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "failed"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
