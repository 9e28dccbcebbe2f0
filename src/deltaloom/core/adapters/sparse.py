"""Sparse adapters: a few elements of each weight, by flat index and value, as a PEFT method.

    import deltaloom.core.adapters  # makes PEFT know them
    model = get_peft_model(model, SparseConfig(target_modules="all-linear", density=0.01))

W' = W + delta, where delta is zero but for `sparse_values` (n,) float32 at `sparse_indices` (n,),
flat and row-major in the weight as it is stored, rising (int32, int64 from 2^31 elements on).
The weight itself is only read: bfloat16 and quantised weights lose nothing to rounding. The number
of elements and the shape of each weight are in adapter_config.json, so every loader of PEFT
(`PeftModel.from_pretrained`, `AutoPeftModel...`, transformers' `load_adapter`) makes the right
buffers, and a model of other shapes is refused. Linear and Conv1D modules are covered.
"""

from __future__ import annotations

import warnings
import zlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from peft.config import PeftConfig
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from peft.utils import resolve_quantization_backend
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.peft_types import PeftType
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from deltaloom.core.adapters._register import register
from deltaloom.core.adapters._sparse_product import Layout, Watch, add_product

KIND = "deltaloom_sparse"


@dataclass
class SparseConfig(PeftConfig):
    """What a sparse adapter is: which modules, how many elements of each."""

    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Modules to adapt; as in LoraConfig."}
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Modules to leave alone; as in LoraConfig."}
    )
    density: float = field(
        default=0.01,
        metadata={"help": "Part of each module's weight that is tuned, where `entries` is silent."},
    )
    entries: dict[str, int] | None = field(
        default=None, metadata={"help": "Elements of each module; filled in when it is made."}
    )
    shapes: dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Shape of each module's weight; filled in likewise."}
    )
    seed: int = field(default=0, metadata={"help": "Decides the random elements of the start."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType(KIND.upper())
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # pyright: ignore
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # pyright: ignore
        if not 0 < self.density <= 1:
            raise ValueError(f"density = {self.density}: give a part above 0 and at most 1")


class SparseLayer(BaseTunerLayer):
    """What PEFT knows sparse adapters by."""

    adapter_layer_names = ("sparse_values",)
    other_param_names = ("sparse_indices",)


class SparseLinear(nn.Module, SparseLayer):
    """A linear module and changes of a few elements of its weight, one set an adapter."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.sparse_values = nn.ParameterDict()
        self.sparse_indices = BufferDict(persistent=True)
        self.watches: dict[str, Watch] = {}
        """Adapter -> what sees the gradients and inputs of each backward pass."""
        self._disable_adapters = False
        self.merged_adapters = []
        self._replaced: list[tuple[Tensor, Tensor]] = []
        """Where merging wrote, and what was there before it, per merged adapter."""
        self.quantization_backend = resolve_quantization_backend(self.get_base_layer())
        self.layout = layout_of(self.get_base_layer())

    def update_layer(
        self, name: str, count: int, seed: list[int], inference_mode: bool = False
    ) -> None:
        """Add the adapter `name` of `count` elements, all zeros, at places that `seed` decides.

        In inference mode they are frozen, and anywhere: a file will say where.
        """
        size = self.layout.numel
        if not 0 <= count <= size:
            raise ValueError(f"entries = {count}: the weight has {size} elements")
        where = torch.arange(count) if inference_mode else random_support(size, count, seed)
        self.sparse_indices[name] = where.to(torch.int32 if size < 1 << 31 else torch.int64)
        self.sparse_values[name] = nn.Parameter(torch.zeros(count))
        self._move_adapter_to_device_of_base_layer(name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        # Unlike PEFT's, this leaves the type: values stay float32 beside a bfloat16 weight.
        device = device or self._get_base_layer_device_and_dtype(self.get_base_layer())[0]
        values = self.sparse_values[adapter_name]
        if device is not None and values.device.type != "meta":
            self.sparse_values[adapter_name] = values.to(device)
            self.sparse_indices[adapter_name] = self.support(adapter_name).to(device)

    def support(self, adapter: str) -> Tensor:
        """Flat indices (n,) of one adapter's elements."""
        found = self.sparse_indices[adapter]
        assert found is not None
        return found

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The whole change of one adapter, in the shape of the weight, float32."""
        return self.layout.dense(self.sparse_values[adapter].detach(), self.support(adapter))

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to the weight; `unmerge` restores it to the bit unless it is quantised.

        With `safe_merge`, raises ValueError when a merged element would not be finite.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.sparse_values:
                continue
            weight = self.get_base_weight().contiguous()
            where, flat = self.support(name).long(), weight.view(-1)
            before = flat[where]
            after = (before.float() + self.sparse_values[name].detach().float()).to(weight.dtype)
            if safe_merge and not torch.isfinite(after).all():
                raise ValueError(f"adapter {name}: merging gives elements that are not finite")
            flat[where] = after
            self.set_base_weight(weight)
            self._replaced.append((where, before))
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Undo every merge, the last first."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        while self.merged_adapters:
            self.merged_adapters.pop()
            where, before = self._replaced.pop()
            weight = self.get_base_weight().contiguous()
            weight.view(-1)[where] = before
            self.set_base_weight(weight)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output and what the active adapters add to it."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        for name in self.active_adapters:
            if name in self.sparse_values:
                values, where = self.sparse_values[name], self.support(name)
                result = add_product(result, x, values, where, self.layout, self.watches.get(name))
        return result

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT's `convert_to_lora` takes it: the change is a matrix like any other."""
        return True


class SparseModel(BaseTuner):
    """A model whose linear modules carry sparse adapters."""

    prefix = "sparse_"
    tuner_layer_cls = SparseLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _check_new_adapter_config(self, config: PeftConfig) -> None:
        super()._check_new_adapter_config(config)
        own = {name for name, _ in self.model.named_modules()}
        missing = sorted({*(getattr(config, "entries", None) or ())} - own)
        if missing:
            raise ValueError(
                f"the sparse adapter changes {missing[0]}, which is no module of this model; "
                "load it on the model it was made for"
            )

    def _create_and_replace(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        config: SparseConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        key = current_key.replace(".base_layer", "")
        new = not isinstance(target, SparseLinear)
        layer = SparseLinear(target) if new else target
        shape = [layer.layout.rows, layer.layout.columns]
        wanted = (config.shapes or {}).get(key, shape)
        if list(wanted) != shape:
            raise ValueError(
                f"the sparse adapter changes {key} of shape {list(wanted)}, here it is {shape}; "
                "load it on the model it was made for"
            )
        share = max(1, int(config.density * layer.layout.numel))
        count = (config.entries or {}).get(key, share)
        seed = [config.seed, zlib.crc32(key.encode())]
        layer.update_layer(adapter_name, count, seed, config.inference_mode)
        config.entries = {**(config.entries or {}), key: count}
        config.shapes = {**(config.shapes or {}), key: shape}
        if new:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)

    @staticmethod
    def _create_new_module(config: SparseConfig, adapter_name: str, target: Any) -> nn.Module:
        return SparseLinear(target)


def layout_of(module: nn.Module) -> Layout:
    """How a linear module's weight lies; raises TypeError for modules that are not covered."""
    if isinstance(module, Conv1D):
        return Layout(*module.weight.shape, transposed=True)
    backend = resolve_quantization_backend(module)
    if isinstance(module, nn.Linear) or (backend and backend.layer_type == "linear"):
        return Layout(int(module.out_features), int(module.in_features), False)  # pyright: ignore
    raise TypeError(
        f"sparse adapters change Linear and Conv1D modules, not {type(module).__name__}; "
        "name other target_modules"
    )


def random_support(size: int, count: int, seed: int | list[int]) -> Tensor:
    """`count` different flat indices below `size`, rising, uniform."""
    dice = np.random.default_rng(seed)
    return torch.from_numpy(np.sort(dice.choice(size, count, replace=False, shuffle=False)))


def sparse_layers(model: nn.Module) -> dict[str, SparseLinear]:
    """The model's sparse layers by the names their modules have in the base, in its order."""
    return {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): module
        for name, module in model.named_modules()
        if isinstance(module, SparseLinear)
    }


register(KIND, SparseConfig, SparseModel, mixed_layer=SparseLayer)
