"""Modules that route between experts, as a PEFT method: `DELTALOOM_ROUTED`.

A routed module computes sum_e p_e(x) f_e(x), p = softmax(G x): f_e is the module of expert e and G,
(experts, in), its router, without bias. A module that is no linear layer (an MLP) is one expert's
whole copy, or its structure with low-rank changes beside the base's own linear layers, which are
not copied. On a linear layer, experts are low-rank changes only and share the layer's output, as
the p_e sum to one. With `layers` > 1 a module also routes to the experts of the same modules in the
layers above it; near the top the window is moved down so that it stays as wide. With `level` =
"example" the router reads the mean of the module's inputs over the tokens so far instead of the
token's own, so that a choice is the example's and changes slowly, and none sees what comes later.

Experts are frozen and in the base's type; routers and low-rank factors are float32.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import PeftType
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from deltaloom.core.adapters._register import register
from deltaloom.core.adapters._running import RunningMeans

NAME = "deltaloom_routed"
KIND = NAME.upper()
LINEAR = (nn.Linear, Conv1D)


@dataclass
class RoutedConfig(PeftConfig):
    """What an `adapter_config.json` says of a routed model."""

    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Modules to route, by the last part of their name."}
    )
    experts: list[str] = field(default_factory=list, metadata={"help": "One name an expert."})
    ranks: list[int] = field(
        default_factory=list, metadata={"help": "Rank of each expert's change; 0 for a copy."}
    )
    include_base: bool = field(
        default=False, metadata={"help": "The base's own module is the first expert."}
    )
    layers: int = field(default=1, metadata={"help": "Layers whose experts a router sees."})
    level: str = field(
        default="token",
        metadata={"help": "What a router reads: the token's input, or the example's mean so far."},
    )

    def __post_init__(self) -> None:
        """Set the kind; raises ValueError for settings that do not fit together."""
        super().__post_init__()
        self.peft_type = PeftType(KIND)
        if len(self.ranks) != len(self.experts) or min(self.ranks, default=0) < 0:
            raise ValueError(f"{len(self.experts)} experts with the ranks {self.ranks}")
        if self.layers < 1:
            raise ValueError(f"layers = {self.layers}: must be at least 1")
        if self.level not in ("token", "example"):
            raise ValueError(f"level = {self.level!r}: must be token or example")


class LowRankBeside(nn.Module):
    """A linear layer with a frozen low-rank change; the layer's own weight is only pointed at."""

    def __init__(self, layer: nn.Module, rank: int) -> None:
        super().__init__()
        into, out = sides(layer)
        self.a = nn.Parameter(torch.zeros(rank, into), requires_grad=False)
        self.b = nn.Parameter(torch.zeros(out, rank), requires_grad=False)
        self.register_buffer("scale", torch.ones(()))
        self.scale: Tensor
        # In a tuple, so that it is no child: its weight belongs to the base and is not saved.
        self.shared = (layer,)

    def change(self, x: Tensor) -> Tensor:
        """`scale * B A x` in float32, (..., out)."""
        inner = nn.functional.linear(x.to(self.a.dtype), self.a)
        return nn.functional.linear(inner, self.b) * self.scale

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output with the change, in the layer's type."""
        own = self.shared[0](x)
        return (own + self.change(x)).to(own.dtype)


def sides(layer: nn.Module) -> tuple[int, int]:
    """Width of the input and of the output of a linear layer."""
    weight: Tensor = layer.weight  # pyright: ignore[reportAssignmentType]
    first, second = weight.shape
    return (first, second) if isinstance(layer, Conv1D) else (second, first)


def expert(module: nn.Module, rank: int) -> nn.Module:
    """A frozen copy of `module`, or (rank > 0) its structure over the same linear layers."""
    if not rank:
        return copy.deepcopy(module).requires_grad_(False)
    if isinstance(module, LINEAR):
        return LowRankBeside(module, rank)
    # What the copy meets of these it takes as it is: no weight is doubled.
    kept: dict[int, Any] = {id(p): p for p in (*module.parameters(), *module.buffers())}
    kept |= {
        id(layer): LowRankBeside(layer, rank)
        for layer in module.modules()
        if isinstance(layer, LINEAR)
    }
    return copy.deepcopy(module, kept)


class RoutedLayer(nn.Module, BaseTunerLayer):
    """A module of the base with its experts and their router."""

    adapter_layer_names = ("routed_gate",)
    other_param_names = ("routed_experts",)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.routed_gate = nn.ModuleDict()
        self.routed_experts = nn.ModuleDict()
        self.window: dict[str, tuple[RoutedLayer, ...]] = {}
        """By adapter, whose experts are routed to; one of them is this layer."""
        self.include_base: dict[str, bool] = {}
        self.means: dict[str, RunningMeans] = {}
        """By adapter, where it routes by example."""
        self.merged_adapters: list[str] = []

    def update_layer(self, adapter_name: str, config: RoutedConfig, width: int) -> None:
        """Add an adapter: its experts, blank, and a router of `width` inputs, PyTorch's start."""
        count = (len(config.experts) + config.include_base) * config.layers
        self.include_base[adapter_name] = config.include_base
        self.window[adapter_name] = (self,)
        self.routed_gate[adapter_name] = nn.Linear(width, count, bias=False)
        self.routed_experts[adapter_name] = nn.ModuleList(
            expert(self.base_layer, rank) for rank in config.ranks
        )
        device = next(self.base_layer.parameters()).device
        for part in (self.routed_gate[adapter_name], self.routed_experts[adapter_name]):
            if not any(p.is_meta for p in part.parameters()):  # PEFT fills those when it loads
                part.to(device)

    def delete_adapter(self, adapter_name: str) -> None:
        """See BaseTunerLayer."""
        super().delete_adapter(adapter_name)
        self.window.pop(adapter_name, None)
        self.means.pop(adapter_name, None)
        self.include_base.pop(adapter_name, None)

    def choices(self, adapter_name: str) -> Iterator[nn.Module]:
        """What the router chooses from, in the order of its outputs."""
        for layer in self.window[adapter_name]:
            if self.include_base[adapter_name]:
                yield layer.base_layer
            yield from layer.routed_experts[adapter_name]  # pyright: ignore[reportGeneralTypeIssues]

    def probabilities(self, adapter_name: str, x: Tensor) -> Tensor:
        """(..., experts) of the inputs (..., in), float32; by example (b, T, in)."""
        gate: Any = self.routed_gate[adapter_name]
        if adapter_name in self.means:
            x = self.means[adapter_name].mean(self, x)
        return gate(x.to(gate.weight.dtype)).float().softmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        """sum_e p_e(x) f_e(x), in the base's type; the base's own output when disabled."""
        active = [name for name in self.active_adapters if name in self.routed_gate]
        if self.disable_adapters or not active:
            return self.base_layer(x)
        (name,) = active  # the tuner lets one be active
        p = self.probabilities(name, x)
        if isinstance(self.base_layer, LINEAR):
            own = total = self.base_layer(x)
            for e, choice in enumerate(self.choices(name)):
                if isinstance(choice, LowRankBeside):
                    total = total + p[..., e, None] * choice.change(x)
            return total.to(own.dtype)
        parts = [choice(x) for choice in self.choices(name)]
        total = p[..., 0, None] * parts[0]
        for e, part in enumerate(parts[1:], 1):
            total = total + p[..., e, None] * part
        return total.to(parts[0].dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused: what is added depends on the input."""
        raise ValueError("a routed model chooses by its input, so it cannot be merged into weights")

    unmerge = merge


class RoutedModel(BaseTuner):
    """Puts `RoutedLayer` in the place of every target module."""

    prefix = "routed_"
    tuner_layer_cls = RoutedLayer
    target_module_mapping: dict[str, list[str]] = {}

    def _create_and_replace(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        peft_config: RoutedConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        layer = target if isinstance(target, RoutedLayer) else RoutedLayer(target)
        inner = layer.base_layer
        if isinstance(inner, LINEAR):
            if not all(peft_config.ranks) or peft_config.layers > 1:
                raise ValueError(
                    f"{current_key} is a linear layer: its experts must be low-rank changes, and "
                    "a router there sees one layer"
                )
            width = sides(inner)[0]
        else:
            width = self.model.config.get_text_config().hidden_size
        layer.update_layer(adapter_name, peft_config, width)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *rest: Any, **named: Any) -> None:
        """See BaseTuner; here and in no hook, since PEFT calls those for the first adapter only."""
        super().inject_adapter(model, adapter_name, *rest, **named)
        self._link(model, self.peft_config[adapter_name], adapter_name)

    def _link(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        """Let every router see the experts of its window, and the example if it routes by it."""
        rows: dict[str, list[RoutedLayer]] = {}
        for key, module in model.named_modules():
            if isinstance(module, RoutedLayer) and adapter_name in module.routed_gate:
                rows.setdefault(key.rpartition(".")[2], []).append(module)
        if config.level == "example":
            means = RunningMeans(model.get_decoder())  # pyright: ignore[reportCallIssue]
            for layer in (layer for row in rows.values() for layer in row):
                layer.means[adapter_name] = means
        if config.layers == 1:
            return
        for name, row in rows.items():
            if len(row) < config.layers:
                raise ValueError(
                    f"layers = {config.layers}: the model has {len(row)} modules named {name}"
                )
            for i, layer in enumerate(row):
                start = min(i, len(row) - config.layers)
                layer.window[adapter_name] = tuple(row[start : start + config.layers])

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """See BaseTuner; raises ValueError for more than one."""
        if not isinstance(adapter_name, str) and len(adapter_name) > 1:
            raise ValueError(f"one routed adapter can be active at a time, not {adapter_name}")
        super().set_adapter(adapter_name, inference_mode)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Nothing: routers and factors are float32 already, copies stay in the base's type."""

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return re.sub(
            rf"\.(routed_gate|routed_experts)\.{re.escape(adapter_name)}(?=\.|$)", r".\1", key
        )


register(NAME, RoutedConfig, RoutedModel)
