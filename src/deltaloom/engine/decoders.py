"""Decoders whose forward pass is understood: what each parameter does, by its name."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from deltaloom.core.errors import InputError

NORMS = ("norm", "query norm", "end norm", "final norm")
"""Kinds of parameters of norms: of the queries, at the end of a residual branch, before the head,
and others."""


@dataclass(frozen=True)
class Family:
    """Where a model type has its parameters, and what their names do not show."""

    layers: str = "model.layers"
    """Module of the blocks."""
    outside: Mapping[str, str] = field(
        default_factory=lambda: {
            "model.embed_tokens": "embedding",
            "model.norm": "final norm",
            "lm_head": "head",
        }
    )
    """Modules that are in no block -> kind of their parameters."""
    inside: Mapping[str, str] = field(
        default_factory=lambda: {
            "self_attn.q_proj": "query",
            "self_attn.k_proj": "hidden",
            "self_attn.v_proj": "hidden",
            "self_attn.o_proj": "end",
            "mlp.gate_proj": "hidden",
            "mlp.up_proj": "hidden",
            "mlp.down_proj": "end",
            "self_attn.q_norm": "query norm",
            "self_attn.k_norm": "norm",
            "input_layernorm": "norm",
            "post_attention_layernorm": "norm",
            "pre_feedforward_layernorm": "norm",
            "post_feedforward_layernorm": "end norm",
        }
    )
    """Modules of a block -> kind: `end` is the last product of a residual branch, `fused` makes
    queries, keys and values at once."""
    one_plus: bool = False
    """Norms multiply by 1 + w."""
    embedding_root: bool = False
    """The embedding is multiplied by the root of the hidden size."""
    transposed: bool = False
    """Weights in blocks are (in, out)."""
    shrinking_ends: bool = False
    """Weights that end a branch begin smaller by the root of the number of layers."""

    @property
    def block(self) -> str:
        """How names of parameters in blocks begin, layers taken together."""
        return f"{self.layers}.*."

    def kinds(self, names: Collection[str], config: Any) -> dict[str, str]:
        """The kind of each parameter, by names with layers taken together.

        Raises InputError for one whose part in the forward pass is not understood.
        """
        found = {name: self._kind(name, config) for name in names}
        if "end norm" in found.values():  # then both branches end in a norm
            for name in found:
                if name.startswith(f"{self.block}post_attention_layernorm."):
                    found[name] = "end norm"
        return found

    def _kind(self, name: str, config: Any) -> str:
        module = name.rpartition(".")[0]
        if module in self.outside:
            return self.outside[module]
        if name.startswith(self.block) and module.removeprefix(self.block) in self.inside:
            return self.inside[module.removeprefix(self.block)]
        raise InputError(
            f"{config.model_type}: the part of parameter {name!r} in the forward pass is not "
            "understood; what is needed is its row in engine/decoders.py"
        )

    def fans(self, kind: str, shape: tuple[int, ...]) -> tuple[int, int]:
        """Outputs and inputs of a weight in a block, (out, in); of one third of a fused one."""
        out, into = (shape[1], shape[0]) if self.transposed else (shape[0], shape[1])
        return (out // 3 if kind == "fused" else out), into


GPT2 = Family(
    layers="transformer.h",
    outside={
        "transformer.wte": "embedding",
        "transformer.wpe": "embedding",
        "transformer.ln_f": "final norm",
        "lm_head": "head",
    },
    inside={
        "ln_1": "norm",
        "attn.c_attn": "fused",
        "attn.c_proj": "end",
        "ln_2": "norm",
        "mlp.c_fc": "hidden",
        "mlp.c_proj": "end",
    },
    transposed=True,
    shrinking_ends=True,
)
NEOX = Family(
    layers="gpt_neox.layers",
    outside={
        "gpt_neox.embed_in": "embedding",
        "gpt_neox.final_layer_norm": "final norm",
        "lm_head": "head",
        "embed_out": "head",
    },
    inside={
        "input_layernorm": "norm",
        "attention.query_key_value": "fused",
        "attention.dense": "end",
        "post_attention_layernorm": "norm",
        "mlp.dense_h_to_4h": "hidden",
        "mlp.dense_4h_to_h": "end",
    },
)
"""`embed_out` is the head's name in earlier versions of transformers."""
GEMMA = Family(one_plus=True, embedding_root=True)
UNDERSTOOD: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(),
    "qwen3": Family(),
    "smollm3": Family(),
    "granite": Family(),
    "olmo2": Family(),
    "gemma": GEMMA,
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "gpt2": GPT2,
    "gpt_neox": NEOX,
}
"""Model types (`model_type` of the config) whose forward pass was checked against the rules."""


def family_of(config: Any) -> Family:
    """The family of a config; raises InputError, by name, for one that is not understood."""
    kind = getattr(config, "model_type", None)
    if kind not in UNDERSTOOD:
        known = ", ".join(sorted(UNDERSTOOD))
        raise InputError(
            f"models of type {kind!r} are not understood (known: {known}); what is needed is a row "
            "in engine/decoders.py that says what its parameters do"
        )
    if getattr(config, "scale_attn_by_inverse_layer_idx", False):
        raise InputError(
            f"{kind}: scale_attn_by_inverse_layer_idx gives every layer attention of its own, "
            "which the rules do not cover; turn it off"
        )
    return UNDERSTOOD[kind]


def layer_free(name: str) -> str:
    """A parameter's name with `*` for its layer."""
    return re.sub(r"\.(layers|h)\.\d+\.", r".\1.*.", name)


def head_size(config: Any) -> int:
    """Size of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def stock_multiplier(config: Any, which: str) -> float:
    """The forward multiplier that the stock model of `config` has at one of three places."""
    if which == "embedding":
        if family_of(config).embedding_root:
            return config.hidden_size**0.5
        return float(getattr(config, "embedding_multiplier", 1.0))
    if which == "residual":
        return float(getattr(config, "residual_multiplier", 1.0))
    return 1.0 / float(getattr(config, "logits_scaling", 1.0))


def score_scale(config: Any) -> float:
    """What the stock model of `config` multiplies attention scores by."""
    if config.model_type == "granite":
        return float(config.attention_multiplier)
    if not getattr(config, "scale_attn_weights", True):
        return 1.0
    if getattr(config, "query_pre_attn_scalar", None):
        return float(config.query_pre_attn_scalar) ** -0.5
    return head_size(config) ** -0.5
