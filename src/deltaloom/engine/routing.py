"""Routing: PEFT modules switched on or off, for each example and each layer of the base.

With gates g (b, L) of zeros and ones, layer l computes for example n
`g[n, l] * layer_with_module(h) + (1 - g[n, l]) * layer(h)`. Nothing is computed twice for that: a
LoRA or bottleneck module adds to its layer's output, so its addition is multiplied by the gate; a
prefix is hidden from the attention of the examples that bypass it. Each module type that can be
routed is one row of `ADDING`, or a prefix.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from deltaloom.core.errors import WorkError

if TYPE_CHECKING:
    from numpy.typing import NDArray

ADDING = re.compile(r"\.(lora_B|bottleneck_up)\.[^.]+$")
"""Modules whose output is added to what the base computes: LoRA's B, a bottleneck's way up."""
LAYER = re.compile(r"\.(\d+)\.")


def draw(chances: NDArray[np.float64], layers: int, key: Sequence[int]) -> NDArray[np.uint8]:
    """Gates (n, layers), each 1 with the chance of its row; equal keys give equal gates."""
    return (np.random.default_rng(key).random((len(chances), layers)) < chances[:, None]).astype(
        np.uint8
    )


class Router:
    """Applies `gates` in every forward pass of a PEFT model until they are None again.

    Gates stay where they are until they are replaced, so that activations recomputed in a backward
    pass are those of the forward pass.
    """

    def __init__(self, model: Any) -> None:
        self.gates: torch.Tensor | None = None
        """(b, layers), or None: every module is on."""
        self._prefix = getattr(model.active_peft_config, "num_virtual_tokens", 0) or 0
        modules = _attentions(model) if self._prefix else _adding(model)
        if not modules:
            raise WorkError("the model has no module that can be routed")
        numbers = sorted({_layer_of(name) for name, _ in modules})
        self.layers = len(numbers)
        """Layers of the base that have modules; what stands outside them counts as one more."""
        for name, module in modules:
            column = numbers.index(_layer_of(name))
            if self._prefix:
                module.register_forward_pre_hook(self._hiding(column), with_kwargs=True)
            else:
                module.register_forward_hook(self._gating(column))

    def _column(self, column: int, batch: int) -> torch.Tensor | None:
        """One layer's gates (b,), None when everything is on."""
        if self.gates is None:
            return None
        if len(self.gates) != batch:
            raise WorkError(
                f"a module sees {batch} rows where the batch has {len(self.gates)}: models that "
                "regroup their rows cannot be routed"
            )
        return self.gates[:, column]

    def _gating(self, column: int) -> Any:
        def hook(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor | None:
            gate = self._column(column, len(output))
            if gate is None:
                return None
            return output * gate.to(output).view(-1, *[1] * (output.dim() - 1))

        return hook

    def _hiding(self, column: int) -> Any:
        def hook(module: Any, args: Any, kwargs: Any) -> Any:
            states = args[0] if args else kwargs["hidden_states"]  # (b, T, h)
            gate = self._column(column, len(states))
            if gate is None:
                return None
            mask = kwargs.get("attention_mask")
            wide = self._prefix + states.shape[1]
            if mask is None:  # everything is seen
                mask = torch.ones(1, 1, states.shape[1], wide, dtype=torch.bool)
                mask = mask.to(states.device)
            if mask.dim() != 4 or mask.shape[-1] != wide:
                raise WorkError(
                    "routing a prefix needs an attention that takes a mask of every pair; load "
                    "the model with attn_implementation sdpa or eager"
                )
            mask = mask.expand(len(states), *mask.shape[1:]).clone()
            closed = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
            mask[gate == 0, :, :, : self._prefix] = closed
            return args, {**kwargs, "attention_mask": mask}

        return hook


def _adding(model: Any) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in model.named_modules() if ADDING.search(name)]


def _attentions(model: Any) -> list[tuple[str, Any]]:
    """The modules that attend: they know their layer's number and take a mask."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(getattr(module, "layer_idx", None), int)
        and {"hidden_states", "attention_mask"} <= {*inspect.signature(module.forward).parameters}
        and not any(hasattr(inner, "layer_idx") for inner in [*module.modules()][1:])
    ]


def _layer_of(name: str) -> int:
    found = LAYER.search(name)
    return int(found[1]) if found else -1
