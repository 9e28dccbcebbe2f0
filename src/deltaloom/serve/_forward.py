"""One pass over rows that are anywhere: some read their prompts, some continue, each with its task.

The model is a stock one of transformers, called with its own cache, positions and a mask of every
row's past. `check` compares such passes with plain ones once, before a model is served.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deltaloom.core.errors import InputError
from deltaloom.engine.forward import accepts_kept_logits, device_of
from deltaloom.serve._cache import Prefix, RowCache

KNOWN = {"full_attention", "sliding_attention"}
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
"""Root mean square of the difference of logits, as a part of their spread, that is rounding; 0.15
in half precision. What a wrong mask makes is of the order of 1."""


class RaggedModel:
    """A causal language model and the cache of at most `rows` rows.

    Raises InputError for a model whose layers keep something else than keys and values.
    """

    def __init__(self, model: Any, name: str, rows: int = 2) -> None:
        self.model, self.name = model, name
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.config = inner.config.get_text_config()
        self.device = device_of(model)
        self.layers: list[str] = list(getattr(self.config, "layer_types", None) or [])
        accepted = inspect.signature(inner.forward).parameters
        if not {"position_ids", "attention_mask", "use_cache"} <= {*accepted}:
            raise self._unfit("it takes no position_ids")
        if not {*self.layers} <= KNOWN:
            raise self._unfit(f"it has layers of {', '.join(sorted({*self.layers} - KNOWN))}")
        self.keyword = "cache" if "cache" in accepted else "past_key_values"
        self.keeps = accepts_kept_logits(model)
        self.eager = getattr(inner.config, "_attn_implementation", "sdpa") == "eager"
        self.window = getattr(self.config, "sliding_window", None)
        self.cache = RowCache(int(self.config.num_hidden_layers), self.device, rows)

    def read(
        self,
        first: int,
        ids: Sequence[Sequence[int]] | Tensor,
        starts: Sequence[int],
    ) -> Tensor:
        """Logits `(b, V)` after each row's last token.

        Args:
            first: The cache's row of the first of these rows; the others follow it.
            ids: Tokens to read, of each row at least one; or embeddings `(b, q, h)`.
            starts: How many tokens each row has read before.
        """
        if isinstance(ids, Tensor):
            counts, inputs = [ids.shape[1]] * len(ids), {"inputs_embeds": ids}
        else:
            counts = [len(row) for row in ids]
            widest = max(counts)
            padded = torch.tensor([[*row, *[0] * (widest - len(row))] for row in ids])
            inputs = {"input_ids": padded.to(self.device)}
        width = max(counts)
        begin = torch.tensor(starts)[:, None]  # (b, 1)
        positions = begin + torch.arange(width)  # (b, q)
        seen = max(a + b for a, b in zip(starts, counts, strict=True))
        # What pads a shorter row is written, too, behind its end.
        self.cache.step(first, positions, seen)
        device_positions = positions.to(self.device)
        last = torch.tensor(counts) - 1
        # Padding stays at its row's last place: the next ones may be beyond the context.
        real = torch.minimum(positions, begin + last[:, None])
        options: dict[str, Any] = {}
        kept = last.unique() if width > 1 else None
        if self.keeps and kept is not None:
            options["logits_to_keep"] = kept.to(self.device)
        logits = self.model(
            **inputs,
            position_ids=real.to(self.device),
            attention_mask=self._mask(device_positions, seen),
            use_cache=True,
            **{self.keyword: self.cache},
            **options,
        ).logits  # (b, k, V)
        if width == 1:
            return logits[:, 0]
        at = torch.searchsorted(kept, last) if self.keeps and kept is not None else last
        return logits[torch.arange(len(counts)), at.to(logits.device)]

    def _mask(self, positions: Tensor, seen: int) -> Any:
        """Which places a token may look at: `(b, 1, q, T)`, by kind of layer where they differ."""
        at = torch.arange(seen, device=self.device)
        here = positions[:, None, :, None]
        full = at <= here
        if not self.window or (self.layers and "sliding_attention" not in self.layers):
            return self._as_taken(full)
        near = self._as_taken(full & (at > here - self.window))
        if not self.layers:
            return near
        return {"full_attention": self._as_taken(full), "sliding_attention": near}

    def _as_taken(self, allowed: Tensor) -> Tensor:
        if not self.eager:
            return allowed
        dtype = self.model.dtype
        return torch.zeros_like(allowed, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)

    def computed_prefix(self, embedded: Tensor) -> Prefix:
        """Keys and values of embeddings `(k, h)` that stand before a prompt."""
        scratch, self.cache = self.cache, RowCache(len(self.cache.layers), self.device, 1)
        try:
            with torch.inference_mode():
                self.read(0, embedded[None].to(self.device, self.model.dtype), [0])
            count = len(embedded)
            layers: Any = self.cache.layers
            return [(one.keys[:count].clone(), one.values[:count].clone()) for one in layers]
        finally:
            self.cache = scratch

    def check(self) -> None:
        """Compare two rows read in pieces, side by side, with plain passes.

        Raises InputError when the model gives something else, as models do that take a mask or a
        cache in a way of their own.
        """
        size = int(self.config.vocab_size)
        rows = [[(7 * i + 3) % size for i in range(9)], [(5 * i + 1) % size for i in range(4)]]
        try:
            with torch.inference_mode():
                self.read(0, [rows[0][:5], rows[1][:2]], [0, 0])
                self.read(0, [rows[0][5:8], rows[1][2:3]], [5, 2])
                found = self.read(0, [rows[0][8:], rows[1][3:]], [8, 3])
                plain = [self.model(torch.tensor([row], device=self.device)) for row in rows]
        except (TypeError, ValueError, RuntimeError, IndexError, AttributeError, KeyError) as error:
            raise self._unfit(f"a pass with a cache of rows fails ({error})") from None
        finally:
            self.cache.release()
        wanted = torch.stack([one.logits[0, -1] for one in plain]).float()
        off = (found.float() - wanted).square().mean().sqrt() / wanted.std().clamp_min(1e-6)
        if not off <= TOLERANCE.get(self.model.dtype, 0.15):
            raise self._unfit(f"rows in a batch get other logits than alone (by {float(off):.2g})")

    def _unfit(self, why: str) -> InputError:
        return InputError(
            f"{self.name}: {type(self.model).__name__} cannot be served in batches: {why}; "
            "serve it with another engine (deltaloom serve --export)"
        )
