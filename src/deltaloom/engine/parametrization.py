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
shifted to c (1 + w) - 1. Weights stay those of a plain checkpoint. Where one tensor makes queries,
keys and values (GPT-2, GPT-NeoX) scores cannot be multiplied: heads must keep their size.

Differs: global clipping is by the norm of the gradients before folding, see `scaled_adam`.

Not covered: experts, gates fused with what they gate, optimizers other than Adam.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from deltaloom.core.errors import InputError
from deltaloom.engine.decoders import (
    NORMS,
    family_of,
    head_size,
    layer_free,
    score_scale,
    stock_multiplier,
)

Depth = Literal["standard", "mup", "depth-mup", "completep"]
ALPHA: dict[str, float] = {"depth-mup": 0.5, "completep": 1.0}
"""Depth exponents; the other two leave depth alone."""


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
        self.family = family_of(config)
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
        self.kinds = self.family.kinds(known, config)
        self.m = config.hidden_size / base.hidden_size
        self.layers = config.num_hidden_layers / base.num_hidden_layers
        self.rules = {
            name: self._rule(layer_free(name), shape, known[layer_free(name)])
            for name, shape in own.items()
        }

    def _rule(self, name: str, shape: torch.Size, base: torch.Size) -> Rule:
        kind, inside = self.kinds[name], name.startswith(self.family.block)
        one_plus = self.family.one_plus and kind in NORMS
        if self.depth == "standard":
            decay = 0.0 if len(shape) == 1 else 1.0
            return Rule(kind, decay=decay, one_plus=one_plus)
        alpha = ALPHA.get(self.depth)
        branch = 1.0 if alpha is None else self.layers**-alpha
        rate = 1.0 if alpha is None else self.layers ** (alpha - 1)
        if not inside:
            rule = Rule(kind, eps=1 / self.m, decay=float(kind not in NORMS), one_plus=one_plus)
            if kind == "embedding":
                rule = Rule(kind, lr=self.scales.embedding_lr, eps=1 / self.m)
        elif len(shape) == 1:
            rule = Rule(kind, 1.0, rate, branch / self.m, 0.0, one_plus=one_plus)
        else:
            fan_out, fan_in = self.family.fans(kind, shape)
            base_out, base_in = self.family.fans(kind, base)
            start = self.scales.init * _spectral(fan_out, fan_in) / _spectral(base_out, base_in)
            start *= self.base.initializer_range / self.config.initializer_range
            if kind == "end" and self.family.shrinking_ends and alpha is not None:
                start *= self.layers**0.5  # the rules' own depth takes the place of the stock one
            m_out, m_in = fan_out / base_out, fan_in / base_in
            rule = Rule(kind, start, rate / m_in, branch / m_out, m_in)
        return rule.folded(self._multiplier(kind))

    def _multiplier(self, kind: str) -> float:
        """The forward multiplier that a parameter of this kind carries."""
        embedding = self.scales.embedding * self._stock("embedding")
        output = self.scales.output / self.m * self._stock("output")
        kinds = {*self.kinds.values()}
        if kind == "embedding":
            return embedding
        if kind == "head":
            return output
        if kind == "final norm":
            return 1.0 if "head" in kinds else output / embedding
        if kind == ("query norm" if "query norm" in kinds else "query"):
            return self.scales.attention * self._attention()
        if kind == "fused" and not math.isclose(self.scales.attention * self._attention(), 1.0):
            raise InputError(
                f"{self.config.model_type}: queries share one tensor with keys and values, so "
                "attention scores cannot be multiplied; keep the size of heads and attention = 1"
            )
        if kind == ("end norm" if "end norm" in kinds else "end"):
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

    family_of(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {name: parameter.shape for name, parameter in model.named_parameters()}


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
