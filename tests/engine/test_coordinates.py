"""The coordinate check is flat under our rules, and sees that the standard ones are not."""

import math

import pytest
import torch
import transformers

from deltaloom.core.encoding import Encoded
from deltaloom.engine.coordinates import Coordinate, coordinates, slopes
from deltaloom.engine.parametrization import Parametrization

torch.set_num_threads(1)
FLAT = 0.2
"""Largest slope, in log change over log size, that counts as flat: over 4 times the size the change
differs by a factor of 1.3. Steep is more than 0.5."""
SIZES = {
    "width": [(32, 2), (64, 2), (128, 2)],
    "layers": [(32, n) for n in (2, 4, 8)],
}
LR, STEPS = 2**-8, 4
KINDS = {
    "llama-untied": (transformers.LlamaConfig, {"tie_word_embeddings": False}),
    "qwen3": (transformers.Qwen3Config, {"tie_word_embeddings": True}),
    "gpt2": (transformers.GPT2Config, {"n_inner": None}),
    "gpt_neox": (transformers.GPTNeoXConfig, {"tie_word_embeddings": False}),
}


def config(kind, hidden, layers):
    cls, own = KINDS[kind]
    if kind in ("llama-untied", "qwen3"):
        own = {**own, "num_key_value_heads": hidden // 16, "head_dim": 16}
    if kind != "gpt2":
        own = {**own, "intermediate_size": 2 * hidden}
    return cls(
        vocab_size=64,
        hidden_size=hidden,
        num_attention_heads=hidden // 16,
        num_hidden_layers=layers,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **own,
    )


def changes(kind, over, rule):
    """Place -> slope."""
    dice = torch.Generator().manual_seed(0)
    drawn = torch.randint(1, 64, (8, 16), generator=dice).tolist()
    rows = [Encoded(str(number), ids, [1] * 16) for number, ids in enumerate(drawn)]
    small, found = config(kind, *SIZES[over][0]), []
    for size in SIZES[over]:
        found += coordinates(
            Parametrization(small, config(kind, *size), rule), rows, 0, LR, STEPS, 0
        )
    return slopes(found, over)


@pytest.mark.parametrize("kind", KINDS)
def test_changes_are_flat_in_width_by_mup_and_grow_without(kind):
    ours, standard = changes(kind, "width", "mup"), changes(kind, "width", "standard")
    assert abs(ours["last block"]) < FLAT, ours
    # The share of the logits' change that comes of the head's random start falls as the root.
    assert -0.5 < ours["logits"] < FLAT, ours
    assert min(standard["last block"], standard["logits"]) > 0.5, standard


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", ["depth-mup", "completep"])
def test_changes_are_flat_in_depth_by_its_rules_and_grow_by_mup_alone(kind, rule):
    ours, alone = changes(kind, "layers", rule), changes(kind, "layers", "mup")
    assert max(map(abs, ours.values())) < FLAT, ours
    assert alone["last block"] > 0.5, alone


def test_slopes_are_those_of_the_changes():
    points = [
        Coordinate("mup", width, 2, step, place, 1.0, 0.3 * width**power * step)
        for width in (32, 64, 256) for step in (1, 2)
        for place, power in (("embedding", 0.0), ("last block", 1.0), ("logits", -0.5))
    ]  # fmt: skip
    assert slopes(points) == pytest.approx({"embedding": 0, "last block": 1, "logits": -0.5})
    points.append(Coordinate("mup", 512, 2, 2, "logits", math.nan, math.nan))
    assert math.isnan(slopes(points)["logits"])
