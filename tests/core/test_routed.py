"""Routed models against arithmetic written out here, and PEFT's own saving and loading."""

import subprocess
import sys

import pytest
import tiny
import torch
from safetensors.torch import load_file

from deltaloom.core.adapters.routed import KIND, LowRankBeside, RoutedConfig, RoutedLayer
from deltaloom.core.base import Base
from deltaloom.core.delta import load
from deltaloom.core.deltas.routed import Routed
from deltaloom.core.errors import InputError

IDS = torch.tensor([[1, 5, 6, 8, 17, 14, 2], [1, 9, 4, 4, 11, 7, 2]])


def routed(base, dtype=None, **settings):
    """`base` with routed MLPs, its experts and routers random."""
    from peft import get_peft_model

    values = {"target_modules": ["mlp"], "experts": ["a", "b"], "ranks": [0, 3], **settings}
    torch.manual_seed(0)
    model = get_peft_model(base.load(dtype), RoutedConfig(task_type="CAUSAL_LM", **values))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "routed" in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return model.eval()


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, RoutedLayer)]


def by_hand(layer, x):
    """The routed Llama MLP, from its weights alone."""
    base, (copied, factored) = layer.base_layer, layer.routed_experts["default"]

    def mlp(gate, up, down):
        return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T

    def weight(name):
        own, beside = getattr(base, name).weight, getattr(factored, name)
        return own + beside.scale * beside.b @ beside.a

    names = ("gate_proj", "up_proj", "down_proj")
    outputs = [
        mlp(*(getattr(copied, name).weight for name in names)),
        mlp(*(weight(name) for name in names)),
    ]
    logits = x @ layer.routed_gate["default"].weight.T
    e = torch.exp(logits - logits.max(-1, keepdim=True).values)
    p = e / e.sum(-1, keepdim=True)
    return sum(p[..., i : i + 1] * y for i, y in enumerate(outputs))


def test_outputs_and_gradients_are_the_formula_in_float64(llama):
    layer = layers_of(routed(llama).double())[0]
    layer.routed_experts["default"][1].up_proj.scale.fill_(2.5)
    x = torch.randn(2, 5, 16, dtype=torch.float64, requires_grad=True)
    probe = torch.randn(2, 5, 16, dtype=torch.float64)
    found = []
    for forward in (layer, lambda x: by_hand(layer, x)):
        y = forward(x)
        wanted = (x, layer.routed_gate["default"].weight)
        found.append((y, *torch.autograd.grad((y * probe).sum(), wanted)))
    for ours, theirs in zip(*found, strict=True):
        # Probabilities are float32 whatever the model's type.
        torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-6)


def test_equal_probabilities_average_the_outputs(llama):
    layer = layers_of(routed(llama).double())[1]
    torch.nn.init.zeros_(layer.routed_gate["default"].weight)
    x = torch.randn(3, 16, dtype=torch.float64)
    first, second = layer.routed_experts["default"]
    torch.testing.assert_close(layer(x), (first(x) + second(x)) / 2, rtol=1e-12, atol=1e-12)


def test_linear_layers_add_weighted_changes(gpt2):
    model = routed(gpt2, target_modules=["c_attn", "c_fc"], ranks=[2, 3]).double()
    for layer in layers_of(model):
        x = torch.randn(4, 16, dtype=torch.float64)
        p = (x @ layer.routed_gate["default"].weight.T).softmax(-1)
        wanted = x @ layer.base_layer.weight + layer.base_layer.bias
        for e, one in enumerate(layer.routed_experts["default"]):
            wanted = wanted + p[:, e : e + 1] * (x @ one.a.T @ one.b.T) * one.scale
        torch.testing.assert_close(layer(x), wanted, rtol=2e-6, atol=2e-6)


def test_only_routers_train_and_low_rank_experts_hold_no_copy(llama):
    model = routed(llama)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 2
    assert all("routed_gate" in name for name in trained)
    inside = layers_of(model)[0].routed_experts["default"][1]
    assert {name.rpartition(".")[2] for name, _ in inside.named_parameters()} == {"a", "b"}
    own = layers_of(model)[0].base_layer.up_proj
    assert inside.up_proj.shared[0] is own


def test_the_base_comes_first_and_disabled_is_the_base(llama):
    model = routed(llama, include_base=True)
    layer = layers_of(model)[0]
    assert next(layer.choices("default")) is layer.base_layer
    assert layer.routed_gate["default"].weight.shape == (3, 16)
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(IDS).logits, llama.load()(IDS).logits)


def test_windows_of_layers_move_down_at_the_top(tmp_path):
    base = Base(model=str(tiny.base_in(tmp_path / "base", num_hidden_layers=4)))
    layers = layers_of(routed(base, layers=3))
    seen = [[layers.index(one) for one in layer.window["default"]] for layer in layers]
    assert seen == [[0, 1, 2], [1, 2, 3], [1, 2, 3], [1, 2, 3]]
    assert layers[0].routed_gate["default"].weight.shape == (6, 16)
    x = torch.randn(2, 16)
    p = layers[0].probabilities("default", x)
    outputs = [one(x) for layer in layers[:3] for one in layer.routed_experts["default"]]
    wanted = sum(p[:, i : i + 1] * y for i, y in enumerate(outputs))
    torch.testing.assert_close(layers[0](x), wanted)
    with pytest.raises(ValueError, match="layers = 5: the model has 4 modules named mlp"):
        routed(base, layers=5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"ranks": [2, 3], "include_base": True, "layers": 2}, {"level": "example"}],
)
def test_peft_loads_what_peft_saved(llama, tmp_path, dtype, settings):
    from peft import PeftModel

    model = routed(llama, dtype, **settings)
    model.save_pretrained(tmp_path / "first")
    for low in (False, True):
        again = PeftModel.from_pretrained(
            llama.load(dtype), tmp_path / "first", low_cpu_mem_usage=low
        )
        with torch.no_grad():
            assert torch.equal(again(IDS).logits, model(IDS).logits)
        again.save_pretrained(tmp_path / "second")
        one, two = (
            load_file(tmp_path / n / "adapter_model.safetensors") for n in ("first", "second")
        )
        assert one.keys() == two.keys()
        assert all(
            torch.equal(one[key], two[key]) and one[key].dtype == two[key].dtype for key in one
        )
    assert any(".routed_gate." in key for key in one)
    assert not any("base_layer" in key or ".default" in key for key in one)


@pytest.mark.parametrize("level", ["token", "example"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_generation_with_a_cache_is_that_without(llama, dtype, level):
    model = routed(llama, dtype, level=level)
    padded = {"input_ids": IDS.clone(), "attention_mask": torch.ones_like(IDS)}
    padded["input_ids"][0, :2], padded["attention_mask"][0, :2] = 0, 0
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    for beams in (1, 3):
        texts, scores = [], []
        for cached in (True, False):
            made = model.generate(
                **padded, **settings, use_cache=cached, num_beams=beams,
                return_dict_in_generate=True, output_logits=True,
            )  # fmt: skip
            texts.append(made.sequences)
            scores.append(torch.stack(made.logits).float())
        assert torch.equal(*texts)
        torch.testing.assert_close(*scores, atol=1e-4 if dtype == "float32" else 0.1, rtol=0.02)


def test_by_example_routers_read_the_mean_so_far(llama):
    model = routed(llama, level="example")
    layer, seen = layers_of(model)[0], []
    layer.register_forward_hook(lambda _, given, made: seen.append((given[0], made)))
    mask = torch.ones_like(IDS)
    mask[1, :3] = 0
    with torch.no_grad():
        model(IDS, attention_mask=mask)
        ((x, y),) = seen
        for row in range(2):
            for t in range(7):
                inside = x[row, : t + 1][mask[row, : t + 1].bool()]
                if len(inside):
                    p = (inside.mean(0) @ layer.routed_gate["default"].weight.T).softmax(-1)
                    parts = [one(x[row, t]) for one in layer.routed_experts["default"]]
                    torch.testing.assert_close(y[row, t], p[0] * parts[0] + p[1] * parts[1])


def test_by_example_nothing_reads_ahead_or_from_a_foreign_cache(llama):
    model = routed(llama, level="example")
    with torch.no_grad():
        whole, part = model(IDS).logits, model(IDS[:, :4])
        torch.testing.assert_close(whole[:, :4], part.logits, atol=1e-5, rtol=0)
        rest = model(IDS[:, 4:], past_key_values=part.past_key_values)
        torch.testing.assert_close(whole[:, 4:], rest.logits, atol=1e-5, rtol=0)
        foreign = llama.load()(IDS[:, :4]).past_key_values
        with pytest.raises(ValueError, match="only from caches that it filled"):
            model(IDS[:, 4:], past_key_values=foreign)
    with pytest.raises(ValueError, match="level = 'row'"):
        routed(llama, level="row")


@pytest.mark.parametrize("level", ["token", "example"])
def test_gradient_checkpointing_gives_the_same_gradients(llama, level):
    found = []
    for checkpointed in (False, True):
        model = routed(llama, level=level).train()
        if checkpointed:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(IDS, labels=IDS).loss.backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    assert len(found[0]) == 2
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*found, strict=True))


def test_what_a_config_must_say(llama):
    with pytest.raises(ValueError, match="2 experts with the ranks"):
        routed(llama, ranks=[1])
    with pytest.raises(ValueError, match="layers = 0"):
        routed(llama, layers=0)
    with pytest.raises(ValueError, match="must be low-rank"):
        routed(llama, target_modules=["q_proj"])
    with pytest.raises(ValueError, match="cannot be merged"):
        routed(llama).merge_and_unload()


def test_two_adapters_live_side_by_side_and_one_is_active(llama, tmp_path):
    model, other = routed(llama), routed(llama, ranks=[2, 0], layers=2, level="example")
    with torch.no_grad():
        before, wanted = model(IDS).logits, other(IDS).logits
        other.save_pretrained(tmp_path)
        model.load_adapter(tmp_path, "more")
        assert torch.equal(model(IDS).logits, before)
        model.set_adapter("more")
        assert torch.equal(model.eval()(IDS).logits, wanted)
        with pytest.raises(ValueError, match="one routed adapter"):
            model.base_model.set_adapter(["default", "more"])
        model.set_adapter("default")
        model.delete_adapter("more")
        assert torch.equal(model(IDS).logits, before)


def test_without_the_import_peft_names_the_kind(llama, tmp_path):
    routed(llama).save_pretrained(tmp_path)
    code = f"from peft import PeftConfig; PeftConfig.from_pretrained({str(tmp_path)!r})"
    bare = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert f"KeyError: '{KIND}'" in bare.stderr
    code = f"import deltaloom.core.adapters; {code}"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_delta_loads_applies_saves_and_refuses(llama, tmp_path):
    model = routed(llama)
    model.save_pretrained(tmp_path / "a")
    delta = load(tmp_path / "a", llama)
    assert isinstance(delta, Routed)
    assert delta.names() == [
        f"model.layers.{i}.mlp.{side}_proj.weight"
        for i in (0, 1)
        for side in ("down", "gate", "up")
    ]
    assert delta.shape("model.layers.0.mlp.up_proj.weight") == (24, 16)
    delta.save(tmp_path / "b")
    again = load(tmp_path / "b", llama)
    assert again.kind == "routed"
    with torch.no_grad():
        assert torch.equal(again.apply(llama)(IDS).logits, model(IDS).logits)
    assert 1.0 * delta is delta
    for refused in (
        lambda: delta.to_dense("model.layers.0.mlp.up_proj.weight"),
        lambda: 2 * delta,
        lambda: delta + delta,
        lambda: delta.norm(),
    ):
        with pytest.raises(InputError, match="chooses between its experts by the input"):
            refused()


def test_a_delta_of_another_base_is_refused(llama, other_llama, gpt2, tmp_path):
    routed(llama).save_pretrained(tmp_path / "a")
    with pytest.raises(InputError, match=r"routes model\.layers.* which .*gpt2 does not have"):
        load(tmp_path / "a", gpt2)
    load(tmp_path / "a", llama).save(tmp_path / "b")
    with pytest.raises(InputError, match="is a delta over"):
        load(tmp_path / "b", other_llama)
    (tmp_path / "a" / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match=r"has no adapter_model\.safetensors"):
        load(tmp_path / "a", llama)


def test_a_low_rank_part_is_the_layer_and_its_change(llama):
    layer = torch.nn.Linear(16, 24)
    beside = LowRankBeside(layer, 2)
    x = torch.randn(3, 16)
    assert torch.equal(beside(x), layer(x))
    torch.nn.init.normal_(beside.a)
    torch.nn.init.normal_(beside.b)
    torch.testing.assert_close(beside(x), layer(x) + x @ (beside.b @ beside.a).T)
