"""Perturbed forward passes against weights that are moved by hand, in float64."""

import copy

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from deltaloom.core.deltas.descent import Rule
from deltaloom.core.encoding import Encoded
from deltaloom.core.errors import InputError
from deltaloom.engine import response_loss
from deltaloom.engine.perturb import Moved, Perturbed
from deltaloom.engine.response_loss import ResponseLoss
from deltaloom.engine.train import collate

SMALL = {"vocab_size": 50, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
WIDE = {**SMALL, "intermediate_size": 24, "num_key_value_heads": 1, "initializer_range": 0.2}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**WIDE, attention_bias=True)),
    "tied": lambda: LlamaForCausalLM(LlamaConfig(**WIDE, tie_word_embeddings=True)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, initializer_range=0.2)
    ),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(**SMALL, ffn_dim=24, max_position_embeddings=32, word_embed_proj_dim=16)
    ),
    # logits are capped and embeddings scaled
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**WIDE, head_dim=8)),
    "mixtral": lambda: MixtralForCausalLM(
        MixtralConfig(
            **WIDE, num_local_experts=4, num_experts_per_tok=2, experts_implementation="eager"
        )
    ),
}


def rule(direction="lowrank", rank=2, eps=1e-2):
    return Rule(
        seed=1,
        direction=direction,
        rank=rank,
        eps=eps,
        update="sgd",
        momentum=0.9,
        decay=0.999,
    )


def rows(count=3):
    generator = torch.Generator().manual_seed(0)
    found = []
    for i in range(count):
        length = 5 + 2 * i
        ids = torch.randint(1, 50, (length,), generator=generator).tolist()
        found.append(Encoded(str(i), ids, [0, 0] + [1] * (length - 2)))
    return found


def made(name):
    torch.manual_seed(0)
    return MODELS[name]().double().eval()


def moved_by_hand(model, own, names, sign, data):
    other = copy.deepcopy(model)
    parameters = dict(other.named_parameters())
    with torch.no_grad():
        for name in names:
            z = own.directions.of(4, 1, name, parameters[name]).dense()
            parameters[name].add_(z, alpha=sign * own.eps)
        batch = collate(data, 0)
        labels = batch.pop("labels")[:, 1:]
        logits = other(**batch).logits[:, :-1]  # transformers' own loss is float32
        return float(cross_entropy(logits.flatten(0, 1), labels.flatten()))


@pytest.mark.parametrize("direction", ["lowrank", "rademacher"])
@pytest.mark.parametrize("name", MODELS)
def test_both_signs_are_the_moved_weights_losses(name, direction):
    model, data, own = made(name), rows(), rule(direction)
    names = [one for one, _ in model.named_parameters()]
    before = copy.deepcopy(model.state_dict())
    with Perturbed(model, names, own) as moved:
        assert moved.together == (name != "mixtral")
        moved.choose(4, 1)
        plus, minus, tokens = ResponseLoss(model, data, 0)(moved, range(3))
        moved.check()
    assert tokens == 2 * sum(len(one.input_ids) for one in data)
    assert plus == pytest.approx(moved_by_hand(model, own, names, 1, data), rel=1e-10)
    assert minus == pytest.approx(moved_by_hand(model, own, names, -1, data), rel=1e-10)
    assert abs(plus - minus) > 1e-4
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert "forward" not in vars(model)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("pattern", ["layers.1.|h.1.", "embed|wte", "norm|ln_"])
def test_chosen_parameters_alone_are_moved(name, pattern):
    import re

    model, data, own = made(name), rows(), rule()
    names = [one for one, _ in model.named_parameters() if re.search(pattern, one)]
    with Perturbed(model, names, own) as moved:
        moved.choose(4, 1)
        plus, minus, _ = ResponseLoss(model, data, 0)(moved, range(3))
    assert plus == pytest.approx(moved_by_hand(model, own, names, 1, data), rel=1e-10)
    assert minus == pytest.approx(moved_by_hand(model, own, names, -1, data), rel=1e-10)


def test_one_sign_after_the_other_and_small_batches_change_nothing(monkeypatch):
    model, data, own = made("llama"), rows(), rule()
    names = [one for one, _ in model.named_parameters()]
    with Perturbed(model, names, own) as moved:
        moved.choose(0, 0)
        wanted = ResponseLoss(model, data, 0)(moved, range(3))
        small = ResponseLoss(model, data, 0, micro_batch=2)(moved, range(3))
        monkeypatch.setattr(response_loss, "TOGETHER", {"cpu": 1, "other": 1})
        monkeypatch.setattr(response_loss, "LOGITS_PER_BLOCK", {"cpu": 150, "other": 150})
        apart = ResponseLoss(model, data, 0)(moved, range(3))
    assert small == pytest.approx(wanted, rel=1e-12)
    assert apart == pytest.approx(wanted, rel=1e-12)


def test_moving_in_place_gives_the_same_losses_and_restores():
    model, data, own = made("tied"), rows(), rule("gaussian")
    names = [one for one, _ in model.named_parameters()]
    before = copy.deepcopy(model.state_dict())
    moved = Moved(model, names, own)
    moved.choose(4, 1)
    plus, minus, _ = ResponseLoss(model, data, 0)(moved, range(3))
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=1e-15)
    model.load_state_dict(before)
    assert plus == pytest.approx(moved_by_hand(model, own, names, 1, data), rel=1e-10)
    assert minus == pytest.approx(moved_by_hand(model, own, names, -1, data), rel=1e-10)


def test_moving_16_bit_weights_in_place_is_refused():
    model = made("llama").bfloat16()
    with pytest.raises(InputError, match=r"rademacher, or base\.dtype=float32"):
        Moved(model, ["model.norm.weight"], rule("gaussian"))


def test_a_parameter_that_no_module_reads_is_named():
    model = made("llama")
    model.add_module("spare", torch.nn.Linear(2, 2).double())
    with Perturbed(model, ["model.norm.weight", "spare.weight"], rule()) as moved:
        ResponseLoss(model, rows(), 0)(moved, range(3))
        with pytest.raises(InputError, match=r"spare\.weight is not read"):
            moved.check()
