"""Width and depth rules for any understood decoder, from two configs and no model code.

Papers: muP, Yang et al. 2022 (Tensor Programs V, arXiv 2203.03466); depth-muP, Yang et al. 2023
(Tensor Programs VI, arXiv 2310.02244); CompleteP, Dey et al. 2025 (arXiv 2505.01618).

A config is compared with a base config at which nothing is changed: m is the ratio of the hidden
sizes, L that of the layers, alpha the depth exponent (0.5 depth-muP, 1 CompleteP). With Adam

    weights in blocks   std x s(fan_in, fan_out)   lr x L^(alpha-1) / m_in   eps x L^-alpha / m_out
    vectors in blocks   as they are                lr x L^(alpha-1)          eps x L^-alpha / m
    embedding, norm     as they are                lr x 1                    eps x 1 / m
    head                as it is                   lr x 1                    eps x 1 / m

where s is the ratio of min(1, sqrt(fan_out / fan_in)) / sqrt(fan_in) (the spectral condition, Yang
et al. 2023, arXiv 2310.17813: 1 / sqrt(m) when all widths grow alike, and right for key and value
projections that do not), with the forward multipliers 1 / m on the logits, L^-alpha on every
residual branch and a ratio on attention scores that makes them 1 / head size. Decoupled weight
decay is multiplied by m_in for weights in blocks, so that lr x decay keeps, and is 0 for vectors.

**No multiplier is left in the forward pass.** Adam does the same to W' = c W with std c, lr c, eps
1 / c and decay 1 / c, so each multiplier is folded into one tensor: of the logits into an untied
head or, with tied embeddings, into the final norm; of attention into the queries' norm or
projection; of a branch into the norm or the projection that ends it; of the embedding into the
embedding (and out of a tied head through the final norm). A norm that multiplies by 1 + w is
shifted to c (1 + w) - 1. Weights stay those of a plain checkpoint.

Differs: global clipping is by the norm of the gradients before folding, see `scaled_adam`.

Not covered: experts, fused projections, optimizers other than Adam.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from deltaloom.core.errors import InputError

Depth = Literal["standard", "mup", "depth-mup", "completep"]
ALPHA: dict[str, float] = {"depth-mup": 0.5, "completep": 1.0}
"""Depth exponents; the other two leave depth alone."""


@dataclass(frozen=True)
class Family:
    """What the forward pass of a model type does that parameter names do not show."""

    one_plus: bool = False
    """Norms multiply by 1 + w."""
    embedding_root: bool = False
    """The embedding is multiplied by the root of the hidden size."""


UNDERSTOOD: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(),
    "qwen3": Family(),
    "smollm3": Family(),
    "granite": Family(),
    "olmo2": Family(),
    "gemma": Family(one_plus=True, embedding_root=True),
    "gemma2": Family(one_plus=True, embedding_root=True),
    "gemma3_text": Family(one_plus=True, embedding_root=True),
}
"""Model types (`model_type` of the config) whose forward pass was checked against these rules."""

BLOCK = "model.layers.*."
"""How names of parameters in blocks begin, layers taken together."""
PROJECTIONS = {
    "self_attn.q_proj": "query",
    "self_attn.k_proj": "hidden",
    "self_attn.v_proj": "hidden",
    "self_attn.o_proj": "end",
    "mlp.gate_proj": "hidden",
    "mlp.up_proj": "hidden",
    "mlp.down_proj": "end",
}
NORMS = (
    "self_attn.q_norm",
    "self_attn.k_norm",
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
END_NORMS = ("post_attention_layernorm", "post_feedforward_layernorm")
OUTSIDE = {
    "model.embed_tokens.weight": "embedding",
    "model.norm.weight": "norm",
    "lm_head.weight": "head",
}


@dataclass(frozen=True)
class Scales:
    """Constants that are the same at every size: what is tuned on a small model and transfers."""

    init: float = 1.0
    """Of the initial weights in blocks."""
    embedding: float = 1.0
    """Forward multiplier of the embedding."""
    output: float = 1.0
    """Forward multiplier of the logits."""
    attention: float = 1.0
    """Forward multiplier of the attention scores."""
    embedding_lr: float = 1.0
    """Learning rate of the embedding over that of the rest."""


@dataclass(frozen=True)
class Rule:
    """What one parameter gets; all numbers multiply what the whole model has."""

    kind: str
    init: float = 1.0
    """Of the architecture's own initial values."""
    lr: float = 1.0
    eps: float = 1.0
    decay: float = 1.0
    multiplier: float = 1.0
    """Forward multiplier that is folded into the others."""
    one_plus: bool = False
    """A norm by 1 + w: `init` multiplies 1 + w."""

    def folded(self, multiplier: float) -> Rule:
        """This rule with a forward multiplier folded in."""
        return Rule(
            self.kind,
            self.init * multiplier,
            self.lr * multiplier,
            self.eps / multiplier,
            self.decay / multiplier,
            self.multiplier * multiplier,
            self.one_plus,
        )


class Parametrization:
    """The rules of every parameter of a model of `config`, relative to `base`.

    With `standard` all rules are one: the architecture's own initialisation and one learning rate.
    Raises InputError for a model type, or a parameter, whose part in the forward pass is not
    understood, and for two configs that differ in more than sizes.
    """

    def __init__(
        self, base: Any, config: Any, depth: Depth = "completep", scales: Scales | None = None
    ) -> None:
        self.base, self.config = base, config
        self.depth: Depth = depth
        self.scales = scales or Scales()
        self.family = _family(config)
        if base.model_type != config.model_type:
            raise InputError(
                f"base and target are of different types ({base.model_type}, {config.model_type}); "
                "rules hold within one architecture"
            )
        own, theirs = shapes(config), shapes(base)
        known = {layer_free(name): shape for name, shape in theirs.items()}
        missing = sorted({layer_free(name) for name in own} ^ known.keys())
        if missing:
            raise InputError(
                f"{missing[0]} is in only one of base and target; their configs must differ in "
                "sizes alone"
            )
        self.names = frozenset(layer_free(name) for name in own)
        self.m = config.hidden_size / base.hidden_size
        self.layers = config.num_hidden_layers / base.num_hidden_layers
        self.rules = {
            name: self._rule(layer_free(name), shape, known[layer_free(name)])
            for name, shape in own.items()
        }

    def _rule(self, name: str, shape: torch.Size, base: torch.Size) -> Rule:
        inside = name.startswith(BLOCK)
        kind = OUTSIDE.get(name) or _kind(name, self.config)
        one_plus = self.family.one_plus and kind == "norm"
        if self.depth == "standard":
            decay = 0.0 if len(shape) == 1 else 1.0
            return Rule(kind, decay=decay, one_plus=one_plus)
        alpha = ALPHA.get(self.depth)
        branch = 1.0 if alpha is None else self.layers**-alpha
        rate = 1.0 if alpha is None else self.layers ** (alpha - 1)
        if not inside:
            rule = Rule(kind, eps=1 / self.m, decay=float(kind != "norm"), one_plus=one_plus)
            if kind == "embedding":
                rule = Rule(kind, lr=self.scales.embedding_lr, eps=1 / self.m)
        elif len(shape) == 1:
            rule = Rule(kind, 1.0, rate, branch / self.m, 0.0, one_plus=one_plus)
        else:
            m_out, m_in = shape[0] / base[0], shape[1] / base[1]
            start = self.scales.init * _spectral(*shape) / _spectral(*base)
            start *= self.base.initializer_range / self.config.initializer_range
            rule = Rule(kind, start, rate / m_in, branch / m_out, m_in)
        return rule.folded(self._multiplier(name, kind))

    def _multiplier(self, name: str, kind: str) -> float:
        """The forward multiplier that this parameter carries."""
        short = name.rpartition(".")[0].removeprefix(BLOCK)
        embedding = self.scales.embedding * self._stock("embedding")
        output = self.scales.output / self.m * self._stock("output")
        tied = "lm_head.weight" not in self.names
        if kind == "embedding":
            return embedding
        if kind == "head":
            return output
        if name == "model.norm.weight":
            return output / embedding if tied else 1.0
        has_norm = f"{BLOCK}self_attn.q_norm.weight" in self.names
        if short == ("self_attn.q_norm" if has_norm else "self_attn.q_proj"):
            return self.scales.attention * self._attention()
        ends_in_norm = f"{BLOCK}post_feedforward_layernorm.weight" in self.names
        if short in END_NORMS if ends_in_norm else kind == "end":
            alpha = ALPHA.get(self.depth)
            depth = 1.0 if alpha is None else self.layers**-alpha
            return depth * self._stock("residual")
        return 1.0

    def _stock(self, which: str) -> float:
        """Base's own forward multiplier over the target's, which is undone by it."""
        return stock_multiplier(self.base, which) / stock_multiplier(self.config, which)

    def _attention(self) -> float:
        """What makes scores q k / head size, with base's scale where it is base."""
        wanted = score_scale(self.base) * head_size(self.base) / head_size(self.config)
        return wanted / score_scale(self.config)

    def initialize(self, model: Any) -> None:
        """Scale the freshly initialised `model` in place; the architecture's own law is kept."""
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                rule = self.rules[name]
                if rule.one_plus:
                    parameter.add_(1).mul_(rule.init).sub_(1)
                elif rule.init != 1:
                    parameter.mul_(rule.init)

    def groups(
        self, model: Any, lr: float, weight_decay: float = 0.0, eps: float = 1e-8
    ) -> list[dict[str, Any]]:
        """AdamW's parameter groups, each with its `multiplier`; parameters of one rule together."""
        found: dict[tuple[float, ...], list[torch.nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                rule = self.rules[name]
                key = (rule.lr, rule.eps, rule.decay, rule.multiplier)
                found.setdefault(key, []).append(parameter)
        return [
            {
                "params": parameters,
                "lr": lr * rate,
                "eps": eps * small,
                "weight_decay": weight_decay * decay,
                "multiplier": multiplier,
            }
            for (rate, small, decay, multiplier), parameters in found.items()
        ]

    def table(self) -> list[dict[str, Any]]:
        """One mapping a parameter name (layers taken together): what it is multiplied by."""
        rows: dict[str, dict[str, Any]] = {}
        for name, rule in self.rules.items():
            rows[layer_free(name)] = {
                "parameter": layer_free(name),
                **{key: getattr(rule, key) for key in ("kind", "init", "lr", "eps", "decay")},
            }
        return list(rows.values())


def shapes(config: Any) -> dict[str, torch.Size]:
    """Parameter shapes of a causal model of `config`, on the meta device: no memory is taken."""
    from transformers import AutoModelForCausalLM

    _family(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def layer_free(name: str) -> str:
    """A parameter's name with `*` for its layer."""
    return re.sub(r"\.layers\.\d+\.", ".layers.*.", name)


def head_size(config: Any) -> int:
    """Size of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def stock_multiplier(config: Any, which: str) -> float:
    """The forward multiplier that the stock model of `config` has at one of three places."""
    if which == "embedding":
        if UNDERSTOOD[config.model_type].embedding_root:
            return math.sqrt(config.hidden_size)
        return float(getattr(config, "embedding_multiplier", 1.0))
    if which == "residual":
        return float(getattr(config, "residual_multiplier", 1.0))
    return 1.0 / float(getattr(config, "logits_scaling", 1.0))


def score_scale(config: Any) -> float:
    """What the stock model of `config` multiplies attention scores by."""
    if config.model_type == "granite":
        return float(config.attention_multiplier)
    if getattr(config, "query_pre_attn_scalar", None):
        return float(config.query_pre_attn_scalar) ** -0.5
    return head_size(config) ** -0.5


def _family(config: Any) -> Family:
    kind = getattr(config, "model_type", None)
    if kind not in UNDERSTOOD:
        known = ", ".join(sorted(UNDERSTOOD))
        raise InputError(
            f"models of type {kind!r} are not understood (known: {known}); what is needed is a row "
            "in engine/parametrization.py that says how its norms and its embedding multiply"
        )
    return UNDERSTOOD[kind]


def _kind(name: str, config: Any) -> str:
    module = name.removeprefix(BLOCK).rpartition(".")[0]
    if module in NORMS:
        return "norm"
    if module in PROJECTIONS:
        return PROJECTIONS[module]
    raise InputError(
        f"{config.model_type}: the part of parameter {name!r} in the forward pass is not "
        "understood; what is needed is its row in engine/parametrization.py"
    )


def _spectral(fan_out: int, fan_in: int) -> float:
    """Initial std, up to a constant, by which a random matrix neither shrinks nor grows."""
    return min(1.0, math.sqrt(fan_out / fan_in)) / math.sqrt(fan_in)


def lora_rates(
    width: float, rank: float, scaling: Literal["alpha/r", "alpha/sqrt(r)"] = "alpha/r"
) -> Mapping[str, float]:
    """Learning rates of LoRA's factors over those at a base with `width` and `rank` times less.

    A maps the width to the rank: each of its rows must move by 1 / width for A x to move by a
    constant. B maps the rank to the width, which moves B A x by rank x lr x scaling: a constant
    with alpha / r, and with alpha / sqrt(r) when lr falls with the root of the rank (the width part
    is LoRA+'s, Hayou et al. 2024, arXiv 2402.12354).
    """
    return {"A": 1 / width, "B": 1.0 if scaling == "alpha/r" else rank**-0.5}
