"""The algebra of deltas, against PEFT and plain arithmetic on the same folders."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from small import adapter_in, logits

from deltaloom.core.base import Base
from deltaloom.core.delta import Delta, load
from deltaloom.core.deltas.dense import Dense
from deltaloom.core.deltas.lowrank import LowRank, read_factors
from deltaloom.core.errors import InputError

# PEFT's advice on tied weights and flags, and a deprecation inside transformers.
pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning:peft", "ignore::FutureWarning:transformers"
)

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
EVERY = ["q_proj", "o_proj", "up_proj", "down_proj"]
PATTERNS = {"rank_pattern": {"up_proj": 5}, "alpha_pattern": {r"layers\.1\..*q_proj": 11}}
ADAPTERS = (
    {"seed": 1},
    {"seed": 2, "r": 3, "lora_alpha": 7, "use_rslora": True, "target_modules": EVERY},
    {"seed": 3, "r": 4, "target_modules": EVERY, **PATTERNS},
)


def oracle(folder, base):
    """What PEFT says an adapter changes, by tensor of the base, float64."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(base.load(), folder)
    return {
        f"{name.removeprefix('base_model.model.')}.weight": module.get_delta_weight(
            "default"
        ).double()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


def dense(delta: Delta):
    return {name: delta.to_dense(name).double() for name in delta.names()}


def agree(found, wanted, close=True):
    """Equal tensor by tensor, a tensor that one side lacks being zero."""
    for name in {*found} | {*wanted}:
        a, b = found.get(name), wanted.get(name)
        a = torch.zeros_like(b) if a is None else a
        b = torch.zeros_like(a) if b is None else b
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, **({"rtol": 1e-5, "atol": 1e-6} if close else EXACT))


EXACT = {"rtol": 0.0, "atol": 0.0}


def combined(weighted):
    """The float64 sum of (factor, tensors)."""
    total = {}
    for factor, tensors in weighted:
        for name, value in tensors.items():
            total[name] = total.get(name, 0) + factor * value
    return total


@pytest.fixture(scope="module")
def tuned(llama, tmp_path_factory):
    """A whole tuned model, as Trainer leaves it."""
    folder = tmp_path_factory.mktemp("tuned") / "model"
    model = llama.load()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for weight in model.parameters():
            weight += torch.randn(weight.shape, generator=generator) * 0.1
    model.save_pretrained(folder)
    llama.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pool(llama, adapter, tuned, tmp_path_factory):
    """Deltas of each kind with the change that each is, by an oracle of its own."""
    found = [(load(adapter(**c), llama), oracle(adapter(**c), llama)) for c in ADAPTERS]
    own, theirs = (load_file(f / "model.safetensors") for f in (tuned, _path(llama)))
    change = {name: own[name].double() - theirs[name].double() for name in own}
    found.append((load(tuned, llama), change))
    stored = tmp_path_factory.mktemp("stored")
    found[-1][0].save(stored)
    found.append((load(stored, llama), change))
    assert [delta.kind for delta, _ in found] == ["lowrank"] * 3 + ["dense"] * 2
    return found


def _path(base):
    from pathlib import Path

    return Path(base.model)


WHICH = st.integers(0, 4)
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
    lowrank = all(which < 3 for _, which in drawn)
    assert isinstance(delta, LowRank if lowrank else Dense)


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


# Disk.


@pytest.mark.parametrize("which", range(5))
def test_saved_and_loaded_untouched(pool, llama, tmp_path, which):
    delta, _ = pool[which]
    delta.save(tmp_path / "d")
    again = load(tmp_path / "d", llama)
    assert again.kind == delta.kind
    agree(dense(again), dense(delta), close=False)
    about = json.loads((tmp_path / "d" / "delta.json").read_text())
    assert about["base"]["fingerprint"] == llama.fingerprint()


def test_an_untouched_adapter_is_copied_byte_for_byte(llama, adapter, tmp_path):
    folder = adapter(**ADAPTERS[2])
    (1.0 * load(folder, llama)).save(tmp_path / "d")
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / "d" / name).read_bytes() == (folder / name).read_bytes()


def test_saving_where_it_lies_changes_nothing(llama, adapter, tmp_path):
    shutil.copytree(adapter(**ADAPTERS[0]), tmp_path / "d")
    before = (tmp_path / "d" / WEIGHTS).read_bytes()
    load(tmp_path / "d", llama).save(tmp_path / "d")
    assert (tmp_path / "d" / WEIGHTS).read_bytes() == before


@settings(max_examples=25)
@given(drawn=SUM)
def test_saved_and_loaded_sums(pool, llama, tmp_path_factory, drawn):
    folder = tmp_path_factory.mktemp("d")
    delta, wanted = built(pool, drawn)
    delta.save(folder)
    agree(dense(load(folder, llama)), dense(delta))
    agree(dense(load(folder, llama)), wanted)


def test_a_combined_adapter_is_peft_s_own_and_gives_the_logits_of_the_sum(pool, llama, tmp_path):
    from peft import PeftModel

    delta, wanted = built(pool, [(1.0, 0), (-0.5, 1), (0.75, 2)])
    delta.save(tmp_path / "d")
    by_peft = logits(PeftModel.from_pretrained(llama.load(), tmp_path / "d").eval())
    by_hand = logits(added(llama, wanted))
    torch.testing.assert_close(by_peft, by_hand, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(delta.apply(llama)), by_hand, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(by_hand, logits(llama.load()), atol=1e-2)
    agree(oracle(tmp_path / "d", llama), wanted)


def added(base, change):
    model = base.load()
    state = model.state_dict()
    with torch.no_grad():
        for name, value in change.items():
            state[name] += value.float()
    return model


@pytest.mark.parametrize(
    "drawn", [[(1.0, 0)], [(1.0, 3)], [(1.0, 4)], [(0.5, 3), (-1.0, 1)], [(0.5, 4), (0.5, 3)]]
)
def test_apply_is_addition(pool, llama, drawn):
    delta, wanted = built(pool, drawn)
    model = delta.apply(llama)
    assert not model.training
    torch.testing.assert_close(logits(model), logits(added(llama, wanted)), rtol=1e-4, atol=1e-5)


def test_adding_to_bfloat16_rounds_once(pool, llama):
    delta, wanted = built(pool, [(0.5, 3), (0.25, 4)])
    half = llama.model_copy(update={"dtype": "bfloat16"})
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


@pytest.mark.parametrize("kind", ["lowrank", "dense"])
def test_a_disk_that_fills_up_leaves_the_previous_delta(llama, adapter, tuned, tmp_path, kind):
    folder = tmp_path / "d"
    source = adapter(**ADAPTERS[1]) if kind == "lowrank" else tuned
    (1.5 * load(source, llama)).save(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    done = subprocess.run(
        [sys.executable, "-c", FULL, llama.model, str(source), str(folder)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "failed"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


# GPT-2's Conv1D modules, embeddings and tied weights.

CONV = ["c_attn", "c_proj", "c_fc"]


@pytest.mark.parametrize("targets", [CONV, ["attn.c_proj"], [*CONV, "wte"], [*CONV, "lm_head"]])
@pytest.mark.parametrize("flag", ["as saved", True, False])
def test_conv1d_adapters_are_read_whatever_the_flag_says(gpt2, tmp_path, targets, flag):
    folder = adapter_in(tmp_path / "a", gpt2, target_modules=targets)
    wanted = oracle(folder, gpt2)
    if flag != "as saved":
        if targets == ["attn.c_proj"]:
            pytest.skip("square modules alone cannot be told apart without the flag")
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**config, "fan_in_fan_out": flag}))
    delta = load(folder, gpt2)
    agree(dense(delta), wanted)


@pytest.mark.parametrize("targets", [CONV, [*CONV, "wte"], [*CONV, "lm_head"], ["wpe", "wte"]])
def test_sums_of_conv1d_and_embedding_adapters_are_saved_as_peft_reads_them(
    gpt2, tmp_path, targets
):
    a = adapter_in(tmp_path / "a", gpt2, seed=1, r=2, target_modules=targets)
    b = adapter_in(tmp_path / "b", gpt2, seed=2, r=3, target_modules=CONV)
    delta = load(a, gpt2) - 0.5 * load(b, gpt2)
    wanted = combined([(1, oracle(a, gpt2)), (-0.5, oracle(b, gpt2))])
    agree(dense(delta), wanted)
    delta.save(tmp_path / "d")
    agree(oracle(tmp_path / "d", gpt2), wanted)
    agree(dense(load(tmp_path / "d", gpt2)), wanted)
    from peft import PeftModel

    theirs = PeftModel.from_pretrained(gpt2.load(), tmp_path / "d").eval()
    torch.testing.assert_close(logits(delta.apply(gpt2)), logits(theirs))


def test_embedding_adapters_beside_linear_ones(llama, tmp_path):
    settings = {"target_modules": ["embed_tokens", "q_proj", "o_proj"]}
    a = adapter_in(tmp_path / "a", llama, seed=1, **settings)
    b = adapter_in(tmp_path / "b", llama, seed=2, r=3, **settings)
    assert any(name.endswith("base_layer.weight") for name in load_file(a / WEIGHTS))
    total = load(a, llama) + load(b, llama)
    wanted = combined([(1, oracle(a, llama)), (1, oracle(b, llama))])
    agree(dense(total), wanted)
    total.save(tmp_path / "d")
    agree(dense(load(tmp_path / "d", llama)), wanted)
    agree(oracle(tmp_path / "d", llama), wanted)


def test_an_embedding_adapter_is_what_peft_merges(llama, tmp_path):
    from peft import PeftModel

    folder = adapter_in(tmp_path / "a", llama, target_modules=["embed_tokens", "q_proj"])
    merged = PeftModel.from_pretrained(llama.load(), folder).merge_and_unload().state_dict()
    base = llama.load().state_dict()
    delta = load(folder, llama)
    for name in delta.names():
        torch.testing.assert_close(base[name] + delta.to_dense(name), merged[name])


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_sums_leave_tied_weights_as_the_adapter_alone_does(llama, tmp_path, target):
    folder = adapter_in(tmp_path / "a", llama, target_modules=[target, "q_proj"])
    delta = load(folder, llama)
    alone = logits(delta.apply(llama))
    torch.testing.assert_close(logits((0.5 * delta + 0.5 * delta).apply(llama)), alone)


def test_a_head_that_the_base_ties_is_not_changed_with_its_embeddings(llama, tuned, tmp_path):
    folder = adapter_in(tmp_path / "a", llama, target_modules=["lm_head", "q_proj"])
    both = load(tuned, llama) + load(folder, llama)
    with pytest.raises(InputError, match=r"lm_head.weight, which .* ties to model.embed_tokens"):
        both.apply(llama)


# Refusals.


def edited(source, folder, **changes):
    shutil.copytree(source, folder)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **changes}))
    return folder


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"use_dora": True}, r"DoRA \(use_dora\) is no low-rank change; merge it with PEFT"),
        ({"bias": "all"}, "LoRA that trains biases"),
        ({"lora_bias": True}, r"LoRA with bias \(lora_bias\)"),
        ({"modules_to_save": ["lm_head"]}, r"modules saved whole \(modules_to_save\)"),
        ({"trainable_token_indices": [1]}, r"trained token rows \(trainable_token_indices\)"),
        ({"layer_replication": [[0, 2]]}, r"replicated layers \(layer_replication\)"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights = 'pissa_niter_4' changes the"),
        ({"peft_type": "IA3"}, "adapter kind 'IA3' is not low-rank"),
        ({"peft_type": None}, "adapter kind None is not low-rank"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_other_adapters_are_refused_by_their_kind(llama, adapter, tmp_path, change, said):
    folder = edited(adapter(**ADAPTERS[0]), tmp_path / "d", **change)
    with pytest.raises(InputError, match=said) as caught:
        load(folder, llama)
    assert f"{folder / CONFIG}: " in str(caught.value)


def test_real_dora_from_peft_is_refused(llama, tmp_path):
    folder = adapter_in(tmp_path / "a", llama, use_dora=True)
    with pytest.raises(InputError, match="DoRA"):
        load(folder, llama)


def with_tensors(source, folder, change):
    shutil.copytree(source, folder)
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    return folder


STEM = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(f"{STEM}.lora_A.weight"), "q_proj lacks lora_A or lora_B"),
        (
            lambda t: t.update({"base_model.model.score.weight": torch.zeros(2, 2)}),
            "tensor base_model.model.score.weight is not a LoRA factor",
        ),
        (
            lambda t: t.update({f"{STEM}.lora_magnitude_vector": torch.zeros(16)}),
            "lora_magnitude_vector is not a LoRA factor",
        ),
        (
            lambda t: t.update({f"{STEM}.lora_B.bias": torch.zeros(16)}),
            "lora_B.bias is not a LoRA factor",
        ),
        (
            lambda t: t.update({f"{STEM}.lora_A.weight": torch.zeros(2, 3, 1, 1)}),
            "lora_A.weight is not a LoRA factor",
        ),
        (lambda t: t.clear(), "holds no LoRA factors"),
    ],
    ids=["half", "head", "dora", "bias", "convolution", "empty"],
)
def test_tensors_that_are_no_factors_are_named(llama, adapter, tmp_path, change, said):
    folder = with_tensors(adapter(**ADAPTERS[0]), tmp_path / "d", change)
    with pytest.raises(InputError, match=said) as caught:
        load(folder, llama)
    assert str(folder / WEIGHTS) in str(caught.value)


def test_resized_embeddings_beside_an_adapter_are_refused(llama, tmp_path):
    source = adapter_in(tmp_path / "a", llama, target_modules=["embed_tokens"])

    def train(tensors):
        (name,) = (name for name in tensors if name.endswith("base_layer.weight"))
        tensors[name][0, 0] += 1

    folder = with_tensors(source, tmp_path / "d", train)
    with pytest.raises(InputError, match="embeddings were resized or trained whole"):
        load(folder, llama)


def test_deltas_of_different_bases_are_refused(llama, other_llama, adapter, tuned):
    one, other = load(adapter(), llama), load(adapter(base=other_llama), other_llama)
    whole = load(tuned, llama)
    for call in (
        lambda: one + other,
        lambda: one - other,
        lambda: one.dot(other),
        lambda: whole + other,
        lambda: other + whole,
        lambda: whole.dot(other),
    ):
        with pytest.raises(InputError, match=r"deltas of different bases.*tune both from one") as e:
            call()
        assert llama.model in str(e.value)
        assert other_llama.model in str(e.value)


@pytest.mark.parametrize("which", [0, 3])
def test_a_delta_recorded_over_another_base_is_refused(pool, llama, other_llama, tmp_path, which):
    pool[which][0].save(tmp_path / "d")
    with pytest.raises(InputError, match=r"is a delta over .*llama .*, not over .*other"):
        load(tmp_path / "d", other_llama)


def test_an_adapter_that_does_not_fit_is_refused(llama, gpt2, adapter, tmp_path):
    with pytest.raises(
        InputError, match=r"adapts model\.layers\.0\..* and nothing that .*gpt2 has"
    ):
        load(adapter(), gpt2)
    import tiny

    wide = Base(model=str(tiny.base_in(tmp_path / "wide", hidden_size=32)))
    with pytest.raises(InputError, match=r"q_proj.weight has shape \[16, 16\], the tensor in"):
        load(adapter(), wide)


def test_a_model_of_another_shape_is_refused(llama, tmp_path):
    import tiny

    with pytest.raises(InputError, match=r"tensor .* has shape \[.*\], the base"):
        load(tiny.base_in(tmp_path / "wide", hidden_size=32), llama)
    with pytest.raises(InputError, match=r"tensor model.layers.2.* is not in the base"):
        load(tiny.base_in(tmp_path / "deep", num_hidden_layers=3), llama)


def test_folders_that_are_no_delta_are_named(llama, tmp_path):
    with pytest.raises(InputError, match=f"{tmp_path}: neither an adapter, a model nor a delta"):
        load(tmp_path, llama)
    with pytest.raises(InputError, match="none: no such folder"):
        load(tmp_path / "none", llama)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        (CONFIG, "{\n'", "adapter_config.json line 2: not JSON"),
        (CONFIG, "[]", "adapter_config.json: must be an object"),
        ("delta.json", "{", "delta.json line 1: not JSON"),
        ("delta.json", "[]", "delta.json: does not say"),
        (WEIGHTS, "short", "is not a whole safetensors file"),
        (WEIGHTS, None, f"has no {WEIGHTS}; copy the adapter again"),
    ],
)
def test_broken_files_are_named(llama, adapter, tmp_path, name, text, said):
    folder = tmp_path / "d"
    shutil.copytree(adapter(), folder)
    if text is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(text)
    with pytest.raises(InputError, match=said):
        load(folder, llama)


@pytest.mark.parametrize(
    ("name", "modules", "said"),
    [
        ("gemma3_270m_svg", 72, None),
        ("distilbert_imdb_lora", None, r"modules saved whole \(modules_to_save\)"),
        ("gpt2_lora_anirudh", None, "score.weight is not a LoRA factor"),
    ],
)
def test_real_adapters_are_read_or_refused_by_name(assets, name, modules, said):
    folder = assets / "adapters" / name
    if said is None:
        factors = read_factors(folder)
        assert len(factors) == modules
        assert {own.scale for own in factors.values()} == {16 / 4}
        return
    with pytest.raises(InputError, match=said):
        read_factors(folder)
