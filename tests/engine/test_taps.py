"""Gradients of every row of a padded batch against autograd, one row alone, in float64."""

import pytest
import torch
import transformers
from torch import nn

from deltaloom.core.errors import InputError
from deltaloom.engine.taps import Taps

COMMON = {
    "vocab_size": 60,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 40,
}
GROUPED = COMMON | {"num_key_value_heads": 1, "head_dim": 8}
IDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
GPT2 = {"vocab_size": 60, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 40}
OPT = {k: v for k, v in COMMON.items() if k != "intermediate_size"} | {"ffn_dim": 24}
DECODERS = {
    "llama": transformers.LlamaConfig(**GROUPED),
    "tied": transformers.LlamaConfig(**GROUPED, tie_word_embeddings=True),
    "qk-norms": transformers.Qwen3Config(**GROUPED),
    "gpt2": transformers.GPT2Config(**GPT2, **IDS),
    "neox": transformers.GPTNeoXConfig(**COMMON),
    "folded": transformers.OPTConfig(**OPT, word_embed_proj_dim=16),
    "scaled": transformers.Gemma3TextConfig(**GROUPED),
}
ENCODERS = {
    "bert": transformers.BertConfig(**COMMON),
    "distilbert": transformers.DistilBertConfig(
        vocab_size=60, dim=16, hidden_dim=24, n_layers=2, n_heads=2, max_position_embeddings=40
    ),
}


def batch():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 60, (4, 12), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    mask[3, 9:] = 0
    return ids * mask, mask


def language_losses(model, ids, mask):
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    return (losses * mask[:, 1:]).sum(1)


def class_logits(model, ids, mask):
    return model(input_ids=ids, attention_mask=mask).logits[:, 1]


def one_by_one(model, values):
    ids, mask = batch()
    found = {name: [] for name, _ in model.named_parameters()}
    for row, own in zip(ids, mask, strict=True):
        model.zero_grad(set_to_none=True)
        length = int(own.sum())
        values(model, row[None, :length], own[None, :length]).sum().backward()
        for name, p in model.named_parameters():
            found[name].append(torch.zeros_like(p) if p.grad is None else p.grad.clone())
    model.zero_grad(set_to_none=True)
    return {name: torch.stack(rows) for name, rows in found.items()}


def tapped(model, values, **options):
    found = {}
    with Taps(model, **options) as taps:
        taps.backward(values(model, *batch()), lambda name, rows: found.update({name: rows}))
        return {name: rows.whole() for name, rows in found.items()}


def disturbed(model):
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.double().eval()


def assert_same(got, wanted, tolerance):
    for name, rows in got.items():
        scale = max(wanted[name].norm(), 1e-6)
        assert (rows - wanted[name]).norm() / scale < tolerance, name


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("kind", DECODERS)
def test_decoders_equal_one_row_at_a_time(kind, checkpointing):
    model = disturbed(transformers.AutoModelForCausalLM.from_config(DECODERS[kind]))
    got = tapped(model, language_losses, checkpointing=checkpointing)
    wanted = one_by_one(model, language_losses)
    assert got.keys() == wanted.keys()
    # transformers' norms compute in float32 whatever they are given
    assert_same(got, wanted, 1e-6)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize("kind", ENCODERS)
def test_classifiers_equal_one_row_at_a_time(kind):
    model = disturbed(transformers.AutoModelForSequenceClassification.from_config(ENCODERS[kind]))
    got = tapped(model, class_logits)
    wanted = one_by_one(model, class_logits)
    assert got.keys() == wanted.keys()
    assert_same(got, wanted, 1e-9)


def test_chosen_parameters_alone_and_several_outputs_of_one_pass():
    model = disturbed(transformers.AutoModelForCausalLM.from_config(DECODERS["llama"]))
    name = "model.layers.1.mlp.down_proj.weight"
    ids, mask = batch()
    found = []
    with Taps(model, [name]) as taps:
        logits = model(input_ids=ids, attention_mask=mask).logits[:, 5]  # (b, V)
        for token in (7, 30):
            taps.backward(
                logits[:, token], lambda n, rows: found.append(rows.whole()), retain_graph=True
            )
    for token, got in zip((7, 30), found, strict=True):
        wanted = one_by_one(
            model, lambda m, i, a, token=token: m(i, attention_mask=a).logits[:, 5, token]
        )
        assert_same({name: got}, wanted, 1e-6)


class Mixing(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)
        self.unread = nn.Linear(3, 1)

    def forward(self, x):
        return self.last(self.norm(self.first(x)))[:, 0]


def test_what_has_no_gradient_per_row_is_refused_by_name():
    with pytest.raises(InputError, match="norm mixes the rows of a batch"):
        Taps(Mixing())
    with pytest.raises(InputError, match="no parameter 'head'"):
        Taps(Mixing(), ["head"])
    model = Mixing().eval()
    taps = Taps(model, ["first.weight", "unread.weight"])
    with taps, pytest.raises(InputError, match=r"unread\.weight gets no gradient"):
        taps.backward(model(torch.ones(2, 3)), lambda *_: None)


def test_experts_are_refused():
    config = transformers.MixtralConfig(**GROUPED, num_local_experts=2, num_experts_per_tok=1)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(InputError, match=r"mlp\.gate does not keep the rows"):
        tapped(model, language_losses)
    attention = [n for n, _ in model.named_parameters() if "self_attn" in n]
    assert tapped(model, language_losses, names=attention).keys() == set(attention)
