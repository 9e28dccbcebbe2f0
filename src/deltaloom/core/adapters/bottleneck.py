"""Bottleneck adapters as a PEFT method: `h + W_up gelu(W_down h + b_down) + b_up`.

Paper: Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP" (arXiv 1902.00751): two
in every layer, after the attention's and the feed-forward's last product and before the residual
sum; W_down random with standard deviation 0.01, W_up and the biases zero, so that a new adapter
changes nothing (the paper's near-identity).

Not covered: merging into the base, which no bottleneck can; layer norms trained beside it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import PeftType
from torch import nn

from deltaloom.core.adapters._register import register

NAME = "deltaloom_bottleneck"
KIND = NAME.upper()
LLAMA = ["o_proj", "down_proj"]
BERT = ["output.dense"]
TARGETS = {
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "smollm3"), LLAMA
    ),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra", "deberta-v2"), BERT),
    "gpt2": ["c_proj"],
    "gpt_neox": ["attention.dense", "dense_4h_to_h"],
    "distilbert": ["out_lin", "lin2"],
    "opt": ["out_proj", "fc2"],
}
"""Last products of attention and feed-forward by model type; `output.dense` ends both of BERT's."""


@dataclass
class BottleneckConfig(PeftConfig):
    """Settings of a bottleneck adapter."""

    bottleneck_size: int = field(default=16, metadata={"help": "Width of the bottleneck."})
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "Modules whose output is adapted, by the end of their name."},
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Other modules to train and save."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType(KIND)
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # pyright: ignore


class BottleneckLayer(nn.Module, BaseTunerLayer):
    """A linear module with bottlenecks after it."""

    adapter_layer_names = ("bottleneck_down", "bottleneck_up")

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: BottleneckConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.bottleneck_down = nn.ModuleDict()
        self.bottleneck_up = nn.ModuleDict()
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: BottleneckConfig) -> None:
        """Add a new adapter that changes nothing yet."""
        width, size = _width(self.get_base_layer()), config.bottleneck_size
        down, up = nn.Linear(width, size), nn.Linear(size, width)
        nn.init.normal_(down.weight, std=0.01)
        for zero in (down.bias, up.weight, up.bias):
            nn.init.zeros_(zero)
        self.bottleneck_down[adapter_name] = down
        self.bottleneck_up[adapter_name] = up
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The module's output (..., width) with what the active adapters add."""
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        total = result
        for name in self.active_adapters:
            if name in self.bottleneck_up:
                down: Any = self.bottleneck_down[name]
                up: Any = self.bottleneck_up[name]
                states = self._cast_input_dtype(result, down.weight.dtype)
                total = total + up(nn.functional.gelu(down(states))).to(result.dtype)
        return total

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """Refused."""
        raise NotImplementedError("a bottleneck is no change of weights and cannot be merged")

    def unmerge(self) -> None:
        """Nothing was merged."""


class BottleneckModel(BaseTuner):
    """A base with bottleneck adapters."""

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLayer
    target_module_mapping = TARGETS

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, BottleneckLayer):
            target.update_layer(adapter_name, peft_config)
            return
        module = BottleneckLayer(target, adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            module.requires_grad_(False)
        self._replace_module(parent, target_name, module, target)


def _width(layer: nn.Module) -> int:
    """Output width of a Linear or of transformers' Conv1D."""
    width = getattr(layer, "out_features", getattr(layer, "nf", None))
    if not isinstance(width, int):
        raise ValueError(f"{type(layer).__name__} is no linear module to put a bottleneck after")
    return width


register(NAME, BottleneckConfig, BottleneckModel)
