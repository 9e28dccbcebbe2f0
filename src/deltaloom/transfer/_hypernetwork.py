"""The hypernetwork: rows of tokens from the rows of their pieces.

Paper: Minixhofer et al. 2024 (arXiv 2405.07883, section 3.2); sizes, scales and the form of the
projections are those of the authors' code.

The pieces' rows (input and output side by side where untied) are scaled to mean 0 and deviation
0.02 in every dimension, projected, and read by an encoder of RoBERTa's kind; what it says of the
first piece goes through a head per table, scaled so that an untrained network's rows have the
table's mean and deviation. Tokens of as many pieces go through together, so nothing is padded.

Differs: dropout is off, as it is in the authors' code.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

DEVIATION = 0.02
"""Of the scaled pieces' rows (RoBERTa's initializer_range)."""
HEAD_WIDTH = 64
"""Hidden dimensions for one attention head (the authors' code)."""
BLOCK = 8192
"""Tokens whose activations are kept at once; with more, all are made anew going back (ours)."""
ANCHORS = 2048
"""Tokens of the base by which the heads are scaled (the authors' code)."""
LEAST = 1e-8
"""Added to deviations (the authors' code)."""


class Hypernetwork(nn.Module):
    """Rows of each table from pieces."""

    source: Tensor

    def __init__(self, tables: Sequence[Tensor], width: int, layers: int) -> None:
        """For the base's tables, float32, each (rows, d): the input's, and the output's if untied.

        Draws its weights from torch's generator.
        """
        super().__init__()
        from transformers import RobertaConfig, RobertaModel

        source = torch.cat(list(tables), 1)  # (rows, d or 2 d)
        scale = DEVIATION / (source.std(0) + LEAST)
        self.register_buffer("source", (source - source.mean(0)) * scale, persistent=False)
        config = RobertaConfig(
            vocab_size=1,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=heads(width),
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        self.enter = nn.Sequential(nn.Linear(source.shape[1], width), Residual(width))
        self.encoder = RobertaModel(config, add_pooling_layer=False)
        self.encoder.embeddings.word_embeddings.requires_grad_(False)  # never looked at
        self.leave = nn.ModuleList(
            nn.Sequential(Residual(width), nn.Linear(width, table.shape[1])) for table in tables
        )
        for part in (self.enter, self.leave):
            part.apply(begin)
        for place, table in enumerate(tables):
            self.register_buffer(f"scale{place}", torch.ones(table.shape[1]))
            self.register_buffer(f"shift{place}", torch.zeros(table.shape[1]))

    @torch.no_grad()
    def scale_to(self, tables: Sequence[Tensor], forms: Sequence[Sequence[int]]) -> None:
        """Scale the heads so that rows of these tokens have the tables' moments."""
        for place, (table, made) in enumerate(zip(tables, self(forms), strict=True)):
            scale = table.std(0) / (made.std(0) + LEAST)
            getattr(self, f"scale{place}").copy_(scale)
            getattr(self, f"shift{place}").copy_(table.mean(0) - made.mean(0) * scale)

    def forward(self, forms: Sequence[Sequence[int]]) -> list[Tensor]:
        """Rows (n, d) for each table; `forms` are the n tokens' pieces, one at least."""
        groups: dict[int, list[int]] = {}
        for place, form in enumerate(forms):
            groups.setdefault(len(form), []).append(place)
        made: list[list[Tensor]] = []
        for places in groups.values():
            for start in range(0, len(places), BLOCK):
                part = places[start : start + BLOCK]
                ids = torch.tensor([list(forms[place]) for place in part])
                ids = ids.to(self.source.device)
                again = torch.is_grad_enabled() and len(forms) > BLOCK
                made.append(
                    checkpoint(self.rows, ids, use_reentrant=False) if again else self.rows(ids)
                )
        order = torch.tensor([place for places in groups.values() for place in places])
        order = order.argsort().to(self.source.device)
        return [torch.cat(list(parts))[order] for parts in zip(*made, strict=True)]

    def rows(self, ids: Tensor) -> list[Tensor]:
        """Rows (n, d) for each table, for tokens of as many pieces, (n, k)."""
        pieces = self.enter(self.source[ids])
        where = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        state = self.encoder(inputs_embeds=pieces, position_ids=where).last_hidden_state[:, 0]
        return [
            head(state).float() * getattr(self, f"scale{place}") + getattr(self, f"shift{place}")
            for place, head in enumerate(self.leave)
        ]


class Residual(nn.Module):
    """LayerNorm(x + gelu(B gelu(A x)))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """(n, ..., width)."""
        inside = nn.functional.gelu(self.first(x), approximate="tanh")
        return self.norm(x + nn.functional.gelu(self.second(inside), approximate="tanh"))


def begin(module: nn.Module) -> None:
    """Flax's first weights, as the authors' code has them: torch's biases would drown the rows."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=module.in_features**-0.5)
        nn.init.zeros_(module.bias)


def heads(width: int) -> int:
    """Attention heads: one for each 64 dimensions, or the next fewer that divide the width."""
    return next(count for count in range(max(width // HEAD_WIDTH, 1), 0, -1) if width % count == 0)
