"""Means over the tokens so far, right under padding, key-value caches and beam search."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

Sums = dict[int, tuple[Tensor, Tensor]]
"""By module, the sum of its inputs (b, 1, h) and their number (b, 1, 1)."""


class RunningMeans:
    """Watches a decoder: which tokens are real, and what a cache's earlier tokens summed to.

    A forward pass with tokens already in its cache goes on from the sums that the pass left that
    filled it; they follow the cache when beam search reorders it.
    """

    def __init__(self, decoder: nn.Module) -> None:
        self.kept: WeakKeyDictionary[Any, Sums] = WeakKeyDictionary()
        self.real = torch.ones(1, 1, 1)
        # Read from one and written to the other: gradient checkpointing runs a layer twice.
        self.before: Sums = {}
        self.after: Sums = {}
        decoder.register_forward_pre_hook(self._start, with_kwargs=True)
        decoder.register_forward_hook(self._end)

    def mean(self, module: nn.Module, x: Tensor) -> Tensor:
        """(b, T, h) float32: at each token the mean of `module`'s inputs `x` up to it."""
        real = self.real.to(x.device)
        sums, counts = (x.float() * real).cumsum(1), real.cumsum(1)
        if id(module) in self.before:
            earlier, number = self.before[id(module)]
            sums, counts = sums + earlier, counts + number
        self.after[id(module)] = sums[:, -1:].detach(), counts[:, -1:]
        return sums / counts.clamp_min(1)

    def _start(self, decoder: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        tokens = given[0] if given else named.get("input_ids")
        tokens = named.get("inputs_embeds") if tokens is None else tokens
        assert tokens is not None
        rows, width = tokens.shape[:2]
        mask = given[1] if len(given) > 1 else named.get("attention_mask")
        if mask is None:
            mask = torch.ones(rows, width)
        elif not isinstance(mask, Tensor) or mask.dim() != 2:
            raise ValueError("routing by example needs the attention mask as (batch, tokens)")
        self.real = mask[:, -width:, None].float()
        cache = named.get("past_key_values", named.get("cache"))
        self.before, self.after = {}, {}
        if cache is not None and cache.get_seq_length() > 0:
            if cache not in self.kept:
                raise ValueError("routing by example goes on only from caches that it filled")
            self.before = self.kept[cache]

    def _end(self, decoder: nn.Module, given: tuple[Any, ...], made: Any) -> None:
        cache = getattr(made, "past_key_values", None)
        if cache is None:
            return
        if cache not in self.kept:
            self._follow(cache)
        self.kept[cache] = self.after

    def _follow(self, cache: Any) -> None:
        """Let the sums take the order that beam search gives the cache."""
        reorder = cache.reorder_cache

        def both(beams: Tensor) -> None:
            reorder(beams)
            self.kept[cache] = {
                key: (sums[beams.to(sums.device)], counts[beams.to(counts.device)])
                for key, (sums, counts) in self.kept[cache].items()
            }

        cache.reorder_cache = both
