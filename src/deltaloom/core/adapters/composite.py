"""Five kinds of small modules in one PEFT method, each absent or of some size, on chosen layers.

    import deltaloom.core.adapters  # makes PEFT know it
    model = get_peft_model(model, CompositeConfig(serial=8, prefix=4, layers_to_transform=[0, 3]))

In a layer, with h the input of its feed-forward and f(h) its output:

    serial     f(h) + U gelu(D f(h))                  Pfeiffer et al. 2021 (arXiv 2005.00247)
    parallel   f(h) + s U gelu(D h), s = 4            He et al. 2022 (arXiv 2110.04366)
    lora       W x + 2 B A x at queries and values    Hu et al. 2021 (arXiv 2106.09685)
    sparse     W x + S x at queries and values        Bhardwaj et al. 2024 (arXiv 2406.13175)
    prefix     keys and values before the others'     Li & Liang 2021 (arXiv 2101.00190)

S has as many elements that are not zero as a low-rank change of rank `sparse` has parameters, at
random places (as SHiRA). U, B and S begin at zero, so that these four change nothing yet; a prefix
begins small and random and does. PEFT's own prefixes cannot be mixed with other kinds and are the
same in every layer; here the attention is given a cache that puts the prefix first, and a mask that
lets it be seen. Models whose layers are `layers.N` with `self_attn` and `mlp` inside are covered,
on attention that takes masks (`sdpa`, `eager`).

Not covered: merging into the base, prefixes made by a network while training.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import PeftType
from torch import Tensor, nn

from deltaloom.core.adapters._register import register
from deltaloom.core.adapters._sparse_product import add_product
from deltaloom.core.adapters.sparse import layout_of, random_support

NAME = "deltaloom_composite"
KIND = NAME.upper()
PARALLEL_SCALE = 4.0
LORA_SCALE = 2.0
TARGETS = ("q_proj", "v_proj")
"""What low ranks and sparse changes are of."""


@dataclass
class CompositeConfig(PeftConfig):
    """Sizes of the five kinds, 0 for none, and the layers that have them."""

    serial: int = field(default=0, metadata={"help": "Width of the bottleneck after the MLP."})
    parallel: int = field(default=0, metadata={"help": "Width of the bottleneck beside the MLP."})
    lora: int = field(default=0, metadata={"help": "Rank at queries and values."})
    sparse: int = field(default=0, metadata={"help": "Elements at queries and values, as a rank."})
    prefix: int = field(default=0, metadata={"help": "Keys and values before the others'."})
    layers_to_transform: list[int] | None = field(
        default=None, metadata={"help": "Numbers of the layers to adapt; None for all."}
    )
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Filled in by the sizes."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType(KIND)
        own = ["self_attn"] * bool(self.lora or self.sparse or self.prefix)
        own += ["mlp"] * bool(self.serial or self.parallel)
        if not own:
            raise ValueError("serial, parallel, lora, sparse, prefix are all 0: nothing to train")
        self.target_modules = set(own)  # pyright: ignore


class CompositeLayer(nn.Module, BaseTunerLayer):
    """A layer's attention or feed-forward with small modules in and beside it."""

    adapter_layer_names = (
        "composite_serial",
        "composite_parallel",
        "composite_lora",
        "composite_sparse",
        "composite_prefix",
    )

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: CompositeConfig, width: int
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.composite_serial = nn.ModuleDict()
        self.composite_parallel = nn.ModuleDict()
        self.composite_lora = nn.ModuleDict()
        self.composite_sparse = nn.ModuleDict()
        self.composite_prefix = nn.ParameterDict()
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._active_adapter = adapter_name
        self.width = width
        for name in TARGETS:
            if hasattr(base_layer, name):
                getattr(base_layer, name).register_forward_hook(self._hook(name))
        self.update_layer(adapter_name, config)

    @property
    def is_attention(self) -> bool:
        """Whether this is a layer's attention, not its feed-forward."""
        return hasattr(self.base_layer, "k_proj")

    def update_layer(self, name: str, config: CompositeConfig) -> None:
        """Add the modules of one more adapter."""
        if self.is_attention:
            if config.lora:
                self.composite_lora[name] = nn.ModuleDict(
                    {target: self._low_rank(target, config.lora) for target in TARGETS}
                )
            if config.sparse:
                self.composite_sparse[name] = nn.ModuleDict(
                    {
                        target: _Sparse(getattr(self.base_layer, target), config.sparse)
                        for target in TARGETS
                    }
                )
            if config.prefix:
                self.composite_prefix[name] = nn.Parameter(self._first_prefix(config.prefix))
        else:
            if config.serial:
                self.composite_serial[name] = _bottleneck(self.width, config.serial)
            if config.parallel:
                self.composite_parallel[name] = _bottleneck(self.width, config.parallel)
        self._move_adapter_to_device_of_base_layer(name, self._device())
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the base layer gives, with what the active adapters add."""
        if self.disable_adapters:
            return self.base_layer(*args, **kwargs)
        if self.is_attention:
            hidden = args[0] if args else kwargs["hidden_states"]
            for name in self.active_adapters:
                if name in self.composite_prefix:
                    kwargs = _with_prefix(
                        self.composite_prefix[name], hidden, kwargs, self._index()
                    )
            return self.base_layer(*args, **kwargs)
        hidden = args[0]
        result = self.base_layer(*args, **kwargs)
        total = result
        for name in self.active_adapters:
            if name in self.composite_parallel:
                total = total + PARALLEL_SCALE * self._through(
                    self.composite_parallel[name], hidden
                )
            if name in self.composite_serial:
                total = total + self._through(self.composite_serial[name], result)
        return total

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """Refused."""
        raise NotImplementedError("bottlenecks and prefixes are no change of weights")

    def unmerge(self) -> None:
        """Nothing was merged."""

    def _through(self, module: Any, x: Tensor) -> Tensor:
        dtype = next(module.parameters()).dtype
        return module(x.to(dtype)).to(x.dtype)

    def _hook(self, target: str) -> Any:
        def add(module: nn.Module, given: tuple[Any, ...], out: Tensor) -> Tensor:
            if self.disable_adapters:
                return out
            for name in self.active_adapters:
                if name in self.composite_lora:
                    factors: Any = self.composite_lora[name]
                    out = out + LORA_SCALE * self._through(factors[target], given[0])
                if name in self.composite_sparse:
                    changes: Any = self.composite_sparse[name]
                    out = changes[target](out, given[0])
            return out

        return add

    def _low_rank(self, target: str, rank: int) -> nn.Sequential:
        base: Any = getattr(self.base_layer, target)
        down = nn.Linear(base.in_features, rank, bias=False)
        up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(up.weight)
        return nn.Sequential(down, up)

    def _first_prefix(self, count: int) -> Tensor:
        """Small and random, (2, key heads, count, head size)."""
        layer: Any = self.base_layer
        heads = layer.k_proj.out_features // layer.head_dim
        return 0.02 * torch.randn(2, heads, count, layer.head_dim)

    def _index(self) -> int:
        return int(getattr(self.base_layer, "layer_idx", 0))

    def _device(self) -> torch.device:
        return next(self.base_layer.parameters()).device

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        # Unlike PEFT's, this leaves the type: modules stay float32 beside bfloat16 weights.
        device = device or self._device()
        if device.type == "meta":
            return
        for kind in self.adapter_layer_names[:-1]:
            if adapter_name in getattr(self, kind):
                getattr(self, kind)[adapter_name].to(device)
        if adapter_name in self.composite_prefix:
            own = self.composite_prefix[adapter_name]
            own.data = own.data.to(device)


class CompositeModel(BaseTuner):
    """A base with composite adapters."""

    prefix = "composite_"
    tuner_layer_cls = CompositeLayer
    target_module_mapping: dict[str, list[str]] = {}

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
        if isinstance(target, CompositeLayer):
            target.update_layer(adapter_name, peft_config)
            return
        width = self.model.config.get_text_config().hidden_size  # pyright: ignore
        module = CompositeLayer(target, adapter_name, peft_config, width)
        if adapter_name not in self.active_adapters:
            module.requires_grad_(False)
        self._replace_module(parent, target_name, module, target)


class _Sparse(nn.Module):
    """A few elements of a linear module's weight, all zero, at places that torch's seed decides."""

    def __init__(self, linear: nn.Module, size: int) -> None:
        super().__init__()
        self.layout = layout_of(linear)
        count = min(size * (self.layout.rows + self.layout.columns), self.layout.numel)
        where = random_support(self.layout.numel, count, int(torch.randint(1 << 31, ())))
        kind = torch.int32 if self.layout.numel < 1 << 31 else torch.int64
        self.indices: Tensor
        self.register_buffer("indices", where.to(kind))
        self.values = nn.Parameter(torch.zeros(count))

    def forward(self, out: Tensor, x: Tensor) -> Tensor:
        """`out` (..., out) with what the elements give of `x` (..., in) added."""
        return add_product(out, x, self.values, self.indices, self.layout, None)


class _Prefixed:
    """A cache that puts a prefix before what the layer's own cache, if any, gives."""

    def __init__(self, inner: Any, prefix: Tensor) -> None:
        self.inner, self.prefix = inner, prefix

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Keys and values (b, heads, T, head size) with the prefix in front."""
        if self.inner is not None:
            keys, values = self.inner.update(keys, values, *args, **kwargs)
        first = self.prefix.to(keys.dtype)[:, None].expand(-1, keys.shape[0], -1, -1, -1)
        return torch.cat([first[0], keys], 2), torch.cat([first[1], values], 2)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def _with_prefix(
    prefix: Tensor, hidden: Tensor, kwargs: dict[str, Any], layer: int
) -> dict[str, Any]:
    """The arguments of an attention layer with a prefix that every token sees."""
    key = "cache" if "cache" in kwargs else "past_key_values"
    inner, mask, count = kwargs.get(key), kwargs.get("attention_mask"), prefix.shape[2]
    past = 0 if inner is None else inner.get_seq_length(layer)
    length = hidden.shape[1]
    if mask is None and length > 1:
        seen = torch.ones(length, past + length, dtype=torch.bool, device=hidden.device)
        closed = torch.finfo(hidden.dtype).min
        mask = torch.zeros(seen.shape, dtype=hidden.dtype, device=hidden.device)
        mask = mask.masked_fill(~seen.tril(past), closed)[None, None]
    if mask is not None:
        if mask.dim() != 4:
            raise NotImplementedError(
                "a prefix needs attention that takes a mask: load the base with "
                "attn_implementation='sdpa' or 'eager'"
            )
        open_ = True if mask.dtype == torch.bool else 0.0
        mask = nn.functional.pad(mask, (count, 0), value=open_)
    return {**kwargs, key: _Prefixed(inner, prefix), "attention_mask": mask}


def _bottleneck(width: int, size: int) -> nn.Sequential:
    """A new one that gives zeros; Houlsby et al.'s standard deviation."""
    down, up = nn.Linear(width, size), nn.Linear(size, width)
    nn.init.normal_(down.weight, std=0.01)
    for zero in (down.bias, up.weight, up.bias):
        nn.init.zeros_(zero)
    return nn.Sequential(down, nn.GELU(), up)


register(NAME, CompositeConfig, CompositeModel)
