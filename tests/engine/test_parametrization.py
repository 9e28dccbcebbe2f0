"""Folding against explicit forward multipliers, rules against the published tables."""

import math

import pytest
import torch
import transformers
from torch.nn.functional import cross_entropy

from deltaloom.core.errors import InputError
from deltaloom.engine.decoders import family_of, score_scale, stock_multiplier
from deltaloom.engine.parametrization import Parametrization, Scales, lora_rates, shapes
from deltaloom.engine.proxy import resized
from deltaloom.engine.scaled_adam import ScaledAdamW

torch.set_num_threads(1)
COMMON = {
    "vocab_size": 13,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
SMALL = {"hidden_size": 8, "intermediate_size": 12, "head_dim": 4, "num_hidden_layers": 1}
LARGE = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 16, "num_hidden_layers": 2}
KINDS = {
    "llama": {"tie_word_embeddings": True},
    "llama-untied": {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
    "mistral": {"tie_word_embeddings": False},
    "qwen2": {"tie_word_embeddings": False},
    "qwen3": {"tie_word_embeddings": True},
    "smollm3": {"tie_word_embeddings": True},
    "olmo2": {"tie_word_embeddings": False},
    "gemma": {"tie_word_embeddings": True},
    "gemma2": {"tie_word_embeddings": True, "query_pre_attn_scalar": 8},
    "gemma3_text": {"tie_word_embeddings": True, "query_pre_attn_scalar": 8},
    "granite": {"tie_word_embeddings": True},
    "gpt2": {"resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0},
    "gpt_neox": {"tie_word_embeddings": False},
    "gpt_neox-tied": {"tie_word_embeddings": True, "use_parallel_residual": False},
}
FUSED = ("gpt2", "gpt_neox", "gpt_neox-tied")
"""Queries, keys and values are one tensor: heads must have one size."""
MULTIPLIERS = {"residual_multiplier": 0.5, "logits_scaling": 4.0, "embedding_multiplier": 2.0}


def config(kind: str, size: dict, **more):
    from transformers import CONFIG_MAPPING

    name = kind.partition("-")[0]
    settings = {**COMMON, **size, **KINDS[kind], **more}
    if name in ("granite", "qwen2", "olmo2"):  # these have no head_dim of their own
        settings["head_dim"] = None
        if name == "granite":
            settings["attention_multiplier"] = 0.3
    if kind in FUSED:
        del settings["head_dim"], settings["num_key_value_heads"]
        settings["num_attention_heads"] = settings["hidden_size"] // 4
    if name == "gpt2":
        settings["n_inner"] = settings.pop("intermediate_size")
    return CONFIG_MAPPING[name](**{k: v for k, v in settings.items() if v is not None})


def fresh(of, seed=0):
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(of).double()
    with torch.no_grad():  # biases and norms begin alike; make them tell folding apart
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                draw = torch.Generator().manual_seed(len(name))
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw).double())
    return model


def batches(count, vocabulary=13):
    draw = torch.Generator().manual_seed(3)
    return [torch.randint(3, vocabulary, (4, 9), generator=draw) for _ in range(count)]


def trained(model, optimizer, clip=None, steps=6):
    """Losses of a few steps; `clip` by torch's own global norm."""
    losses = []
    for ids in batches(steps):
        logits = model(ids).logits
        loss = cross_entropy(logits[:, :-1].reshape(-1, 13), ids[:, 1:].reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        losses.append(loss.item())
    return losses


def unfolded(rules, model, lr, decay, eps):
    """`model` with explicit forward multipliers, and its groups: what folding must equal."""
    embedding = next(rule for rule in rules.rules.values() if rule.kind == "embedding")
    tied = all(rule.kind != "head" for rule in rules.rules.values())
    modules = dict(model.named_modules())
    for name, rule in rules.rules.items():
        if not name.endswith("weight") or rule.multiplier == 1:
            continue
        factor = rule.multiplier
        if rule.kind == "final norm" and tied:
            factor *= embedding.multiplier
        modules[name.removesuffix(".weight")].register_forward_hook(
            lambda module, given, out, factor=factor: out * factor
        )
    groups = []
    for name, parameter in model.named_parameters():
        rule = rules.rules[name]
        with torch.no_grad():
            if rule.one_plus:
                parameter.add_(1).mul_(rule.init / rule.multiplier).sub_(1)
            else:
                parameter.mul_(rule.init / rule.multiplier)
        groups.append(
            {
                "params": [parameter],
                "lr": lr * rule.lr / rule.multiplier,
                "eps": eps * rule.eps * rule.multiplier,
                "weight_decay": decay * rule.decay * rule.multiplier,
            }
        )
    return groups


@pytest.fixture
def exact(monkeypatch):
    """Keeps doubles double where transformers would round them to float32 inside a layer."""
    to, softmax = torch.Tensor.to, torch.nn.functional.softmax

    def keep(self, *args, **more):
        rounds = self.dtype == torch.float64 and args[:1] == (torch.float32,)
        return self if rounds else to(self, *args, **more)

    monkeypatch.setattr(torch.Tensor, "to", keep)
    monkeypatch.setattr(torch.Tensor, "float", lambda self: keep(self, torch.float32))
    monkeypatch.setattr(
        torch.nn.functional, "softmax", lambda x, dim, dtype=None, **more: softmax(x, dim)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_folding_equals_explicit_forward_multipliers(kind, exact):
    attention = 1.0 if kind in FUSED else 1.3
    scales = Scales(init=1.5, embedding=0.7, output=2.0, attention=attention, embedding_lr=3.0)
    more = MULTIPLIERS if kind == "granite" else {}
    rules = Parametrization(config(kind, SMALL), config(kind, LARGE, **more), "completep", scales)
    lr, decay, eps, clip = 3e-3, 0.1, 1e-3, 0.5
    model = fresh(rules.config)
    rules.initialize(model)
    own = trained(model, ScaledAdamW(rules.groups(model, lr, decay, eps), clip))
    other = fresh(rules.config)
    explicit = torch.optim.AdamW(unfolded(rules, other, lr, decay, eps))
    assert own == pytest.approx(trained(other, explicit, clip), abs=1e-9)
    plain = fresh(rules.config)
    assert abs(own[0] - trained(plain, torch.optim.AdamW(plain.parameters()), steps=1)[0]) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_the_stock_multipliers_are_those_of_the_stock_model(kind):
    more = MULTIPLIERS if kind == "granite" else {}
    model = fresh(config(kind, LARGE, **more))
    seen = []
    block = model.get_submodule(family_of(model.config).layers)[0]
    block.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    ids = torch.tensor([[3, 4, 5]])
    model(ids)
    if kind != "gpt2":  # which adds positions
        ratio = (seen[0] / model.get_input_embeddings().weight[ids]).mean().item()
        assert ratio == pytest.approx(stock_multiplier(model.config, "embedding"), rel=1e-6)
    parts = dict(block.named_children())
    attention = next(parts[name] for name in ("self_attn", "attn", "attention") if name in parts)
    assert attention.scaling == pytest.approx(score_scale(model.config))


def test_a_stock_llama_follows_granite_with_its_multipliers():
    """An independent implementation of forward multipliers, with muP's table written out."""
    d, depth, head = 4.0, 2.0, 4.0
    target = config("llama", LARGE)
    rules = Parametrization(config("llama", SMALL), target)
    model = fresh(target)
    rules.initialize(model)
    lr, decay, eps = 3e-3, 0.1, 1e-3
    own = trained(model, ScaledAdamW(rules.groups(model, lr, decay, eps)))
    scaled = transformers.GraniteConfig(
        **{**target.to_dict(), "model_type": "granite"},
        logits_scaling=d,
        residual_multiplier=1 / depth,
        attention_multiplier=4**-0.5 / head,
        embedding_multiplier=1.0,
    )
    other = fresh(scaled)
    other.load_state_dict(fresh(target).state_dict())
    groups = []
    for name, parameter in other.named_parameters():
        hidden = parameter.dim() == 2 and "layers" in name
        branch = "layers" in name
        with torch.no_grad():
            parameter.mul_(d**-0.5 if hidden else 1.0)
        groups.append(
            {
                "params": [parameter],
                "lr": lr / d if hidden else lr,
                "eps": eps / d / (depth if branch else 1.0),
                "weight_decay": decay * (d if hidden else parameter.dim() == 2),
            }
        )
    # key and value heads: one of twice the size here
    assert own == pytest.approx(trained(other, torch.optim.AdamW(groups)), abs=1e-9)


def test_rules_are_the_published_tables():
    """Tensor Programs V, table 3 (no multiplier), and CompleteP's table, at m = 4 and L = 8."""
    size = {**SMALL, "num_key_value_heads": 2}
    wide = {key: 4 * value for key, value in SMALL.items() if key != "head_dim"}
    wide |= {"num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 8}
    small, large = config("llama-untied", size), config("llama-untied", wide, head_dim=4)
    rules = Parametrization(small, large, "mup").rules
    up, head = rules["model.layers.3.mlp.up_proj.weight"], rules["lm_head.weight"]
    assert (up.init, up.lr, up.eps, up.decay) == pytest.approx((4**-0.5, 1 / 4, 1 / 4, 4))
    assert (head.init, head.lr) == (1 / 4, 1 / 4)  # std 1 / fan_in and lr 1 / fan_in
    embedding, norm = rules["model.embed_tokens.weight"], rules["model.norm.weight"]
    assert (embedding.init, embedding.lr, norm.init, norm.lr) == (1, 1, 1, 1)
    bias = rules["model.layers.0.self_attn.k_proj.bias"]
    assert (bias.init, bias.lr, bias.decay) == (1, 1, 0)
    for depth, alpha in (("depth-mup", 0.5), ("completep", 1.0)):
        rules = Parametrization(small, large, depth).rules
        up, end = (rules[f"model.layers.3.mlp.{name}_proj.weight"] for name in ("up", "down"))
        norm = rules["model.layers.0.input_layernorm.weight"]
        rate, branch = 8 ** (alpha - 1), 8**-alpha
        assert (up.init, up.lr, up.eps) == pytest.approx((1 / 2, rate / 4, branch / 4))
        assert (end.init, end.lr) == pytest.approx((branch / 2, rate / 4 * branch))
        assert (end.eps, end.decay) == pytest.approx((1 / 4, 4 / branch))
        assert (norm.init, norm.lr) == pytest.approx((1, rate))
        assert rules["model.norm.weight"].lr == rules["model.embed_tokens.weight"].lr == 1


def test_one_tensor_for_queries_keys_and_values_has_the_rules_of_three():
    """A GPT-2 at m = 4 and L = 2: its weights are (in, out) and its ends begin smaller."""
    wide = {**LARGE, "intermediate_size": 48}
    small, large = config("gpt2", SMALL), config("gpt2", wide)
    rules = Parametrization(small, large).rules
    fused, up, end = (
        rules[f"transformer.h.1.{name}.weight"]
        for name in ("attn.c_attn", "mlp.c_fc", "mlp.c_proj")
    )
    assert (fused.init, fused.lr, fused.eps) == pytest.approx((1 / 2, 1 / 4, 1 / 8))
    assert (up.init, up.lr, up.eps) == pytest.approx((1 / 2, 1 / 4, 1 / 8))
    # 1 / L of the branch, and the root of L that the stock initialisation divides by
    assert (end.init, end.lr) == pytest.approx((2**0.5 / 4, 1 / 8))
    # of the target's stock std 0.2 / sqrt(4), this is the base's 0.2 / sqrt(2) / sqrt(m) / L
    assert end.init * 0.2 / 4**0.5 == pytest.approx(0.2 / 2**0.5 / 2 / 2)
    for ending in ("weight", "bias"):
        norm = rules[f"transformer.ln_f.{ending}"]
        assert (norm.init, norm.decay) == pytest.approx((1 / 4, 0))
    assert rules["transformer.wpe.weight"] == rules["transformer.wte.weight"]
    neox = Parametrization(config("gpt_neox", SMALL), config("gpt_neox", wide)).rules
    ours = neox["gpt_neox.layers.1.attention.query_key_value.weight"]
    assert (ours.init, ours.lr, ours.eps) == pytest.approx((1 / 2, 1 / 4, 1 / 8))


def test_nothing_changes_at_the_base_and_nothing_is_scaled_without_rules():
    base = config("qwen3", SMALL)
    for rules in (
        Parametrization(base, base),
        Parametrization(base, config("qwen3", LARGE), "standard"),
    ):
        for rule in rules.rules.values():
            assert (rule.init, rule.lr, rule.eps, rule.multiplier) == (1, 1, 1, 1)


def test_key_and_value_heads_that_do_not_grow_follow_the_spectral_condition():
    wide = {**SMALL, "hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 32}
    rules = Parametrization(config("llama", SMALL), config("llama", wide)).rules
    key = rules["model.layers.0.self_attn.k_proj.weight"]
    assert key.lr == 1 / 16
    assert key.init == pytest.approx(math.sqrt(4 / 128 / 128) / math.sqrt(4 / 8 / 8))


def test_what_is_not_understood_is_refused_by_name():
    opt = transformers.OPTConfig()
    with pytest.raises(InputError, match=r"type 'opt' are not understood \(known: gemma, .*row"):
        Parametrization(opt, opt)
    small, large = config("gpt2", SMALL), config("gpt2", LARGE)
    with pytest.raises(InputError, match="keep the size of heads and attention = 1"):
        Parametrization(small, large, scales=Scales(attention=2.0))
    with pytest.raises(InputError, match="no multiple of the size 4 of a head"):
        resized(large, 0.3)
    large.scale_attn_by_inverse_layer_idx = True
    with pytest.raises(InputError, match="turn it off"):
        Parametrization(small, large)
    llama, tied = config("llama-untied", SMALL), config("llama", SMALL)
    with pytest.raises(InputError, match=r"lm_head.weight is in only one of base and target"):
        Parametrization(llama, tied, "mup")
    with pytest.raises(InputError, match=r"of different types \(llama, qwen3\)"):
        Parametrization(llama, config("qwen3", SMALL))


def test_a_proxy_keeps_head_sizes_and_every_shape_is_found_without_memory():
    large = transformers.Qwen3Config(
        hidden_size=4096,
        intermediate_size=12288,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        num_hidden_layers=36,
        vocab_size=151936,
    )
    small = resized(large, 1 / 16, 1 / 9)
    assert (small.hidden_size, small.num_hidden_layers, small.head_dim) == (256, 4, 128)
    assert (small.num_attention_heads, small.num_key_value_heads) == (2, 1)
    assert len(small.layer_types) == 4
    assert shapes(large)["model.layers.35.mlp.up_proj.weight"] == (12288, 4096)
    assert len(Parametrization(large, small).table()) == 14
    gpt = transformers.GPT2Config(n_embd=1024, n_head=16, n_layer=24)
    small = resized(gpt, 1 / 8, 1 / 12)
    assert (small.n_embd, small.n_head, small.n_layer, small.n_inner) == (128, 2, 2, None)
    assert shapes(small)["transformer.h.1.mlp.c_fc.weight"] == (128, 512)
    assert len(Parametrization(gpt, small).table()) == 16
    with pytest.raises(InputError, match="hidden size 1 and"):
        resized(small, 1 / 128)


def test_lora_rates():
    assert lora_rates(4, 2) == {"A": 1 / 4, "B": 1}
    assert lora_rates(4, 4, "alpha/sqrt(r)") == {"A": 1 / 4, "B": 1 / 2}
