"""Training the hypernetwork: first to give back the base's rows, then on text in other tokenizers.

Paper: Minixhofer et al. 2024 (arXiv 2405.07883, sections 3.1 and 3.3); losses, optimizer and
schedule are those of the authors' code.

Identity: mean over tokens of the base of |e - E|^2, summed over dimensions. Then each step draws a
tokenizer, and loss = cross-entropy of the frozen base with the network's rows in the place of its
tables + near * mean |e - E|^2 / mean |E| over the tokens that are one piece. Special tokens keep
their rows.

A step's random choices depend on the seed and its number; a checkpoint holds the weights and the
optimizer's moments, and training goes on from the last one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from deltaloom.core.atomic import new_file
from deltaloom.core.errors import WorkError
from deltaloom.core.progress import progress
from deltaloom.engine.forward import LOGITS_PER_BATCH
from deltaloom.engine.meter import count_training
from deltaloom.transfer._hypernetwork import ANCHORS, Hypernetwork
from deltaloom.transfer._sampled_tokenizers import Sampled, TokenizerSampler

if TYPE_CHECKING:
    from deltaloom.core.run import Run
    from deltaloom.core.vocabulary import Vocabulary

BETAS = (0.9, 0.95)
"""Of Adam (the authors' code)."""
WEIGHT_DECAY = 0.01
"""Of matrices (the authors' code)."""
CLIP = 0.1
"""Largest norm of a gradient (the authors' code)."""
FLOOR = 0.1
"""Share of the learning rate that is left at the end (the authors' code)."""


@dataclass(frozen=True)
class HyperSettings:
    """What training needs to know; the method's fields say what each means and where it is from."""

    steps: int
    identity_steps: int
    identity_lr: float
    identity_tokens: int
    lr: float
    warmup_steps: int
    near: float
    pieces: int
    precision: Literal["float32", "bfloat16"]

    def lr_at(self, step: int) -> float:
        """Learning rate of a step, from 0: it rises through the identity phase and once more after
        it, and falls along a cosine.
        """
        if step < self.identity_steps:
            return self.identity_lr * (step + 1) / self.identity_steps
        step -= self.identity_steps
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        rest = max(self.steps - self.identity_steps - self.warmup_steps, 1)
        share = 0.5 * (1 + math.cos(math.pi * min((step - self.warmup_steps) / rest, 1.0)))
        return self.lr * (FLOOR + (1 - FLOOR) * share)


class HyperTraining:
    """The network, the frozen base and what they learn from."""

    def __init__(
        self,
        model: Any,
        vocabulary: Vocabulary,
        sampler: TokenizerSampler,
        settings: HyperSettings,
        width: int | None,
        layers: int,
    ) -> None:
        """`model` is changed, as tables of other sizes will take the place of its own. The network
        is drawn from torch's generator.
        """
        self.model, self.sampler = model, sampler
        self.settings, self.vocabulary = settings, vocabulary
        self.device = next(model.parameters()).device
        inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
        inputs.padding_idx = None  # may be no row of a small tokenizer's table
        tied = outputs.weight is inputs.weight
        tables = [inputs.weight] if tied else [inputs.weight, outputs.weight]
        self.tables = [table.detach().float() for table in tables]
        names = {id(weight): name for name, weight in model.named_parameters()}
        self.names = [names[id(table)] for table in tables]
        self.known = [
            number
            for number, token in enumerate(vocabulary.tokens)
            if token is not None and number < len(self.tables[0])
        ]
        self.pieces = lru_cache(maxsize=2**20)(self._pieces)
        held = [table.cpu() for table in self.tables]
        self.network = Hypernetwork(held, width or held[0].shape[1], layers)
        anchors = [self.vocabulary.tokens[number] or b"" for number in self.known[:ANCHORS]]
        forms = [form for token in anchors if (form := self.pieces(token))]
        self.network.scale_to(held, forms)
        self.network.to(self.device)

    def _pieces(self, token: bytes) -> tuple[int, ...]:
        found = (one for one in self.vocabulary.pieces(token) if one < len(self.tables[0]))
        return tuple(found)[: self.settings.pieces]

    def train(self, run: Run, home: Path) -> None:
        """Train; goes on from the checkpoint in the folder `home`. Raises WorkError for a loss
        that is not finite.
        """
        settings, total = self.settings, self.settings.steps
        optimizer = torch.optim.AdamW(self._groups(), betas=BETAS, lr=0.0)
        first = restore(home, self.network, optimizer)
        run.rewind(first)
        every, window = math.ceil(total / 10), max(1, total // 100)
        tokens = 0
        with progress("hypernetwork", total, first) as advance:
            for step in range(first, total):
                for group in optimizer.param_groups:
                    group["lr"] = settings.lr_at(step)
                optimizer.zero_grad()
                losses, count = self._step(step)
                if not all(map(math.isfinite, losses.values())):
                    raise WorkError(
                        f"the hypernetwork's losses are {losses} at step {step + 1}; "
                        "try a smaller identity_lr or network_lr"
                    )
                torch.nn.utils.clip_grad_norm_(self.network.parameters(), CLIP)
                optimizer.step()
                tokens += count
                advance(1)
                if (step + 1) % window == 0:
                    run.log(step=step + 1, lr=settings.lr_at(step), **losses)
                if (step + 1) % every == 0 or step + 1 == total:
                    count_training(run, self.model, tokens, "adapter")
                    tokens = 0
                    keep(home, self.network, optimizer, step + 1)
                    run.save()

    @torch.no_grad()
    def predict(self, forms: Sequence[Sequence[int]]) -> list[Tensor]:
        """Rows for each table, float32 on the CPU, (n, d)."""
        return [rows.float().cpu() for rows in self.network(forms)]

    def _groups(self) -> list[dict[str, Any]]:
        trained = [weight for weight in self.network.parameters() if weight.requires_grad]
        return [
            {"params": [one for one in trained if one.dim() > 1], "weight_decay": WEIGHT_DECAY},
            {"params": [one for one in trained if one.dim() < 2], "weight_decay": 0.0},
        ]

    def _step(self, step: int) -> tuple[dict[str, float], int]:
        """Make the gradient of a step; its losses and the tokens put through the base."""
        if step < self.settings.identity_steps:
            return {"identity_loss": self._identity(step)}, 0
        return self._language(step)

    def _identity(self, step: int) -> float:
        dice = np.random.default_rng([self.sampler.seed, step, 2])
        count = min(self.settings.identity_tokens, len(self.known))
        chosen = sorted(dice.choice(self.known, count, replace=False).tolist())
        with self._precision():
            made = self.network([(number,) for number in chosen])
        wanted = [table[chosen] for table in self.tables]
        pairs = zip(made, wanted, strict=True)
        loss = torch.stack([(a - b).square().sum(1).mean() for a, b in pairs]).mean()
        loss.backward()
        return loss.item()

    def _language(self, step: int) -> tuple[dict[str, float], int]:
        texts, tokenizer = self.sampler.draw(step)
        rows = Rows.of(texts, tokenizer, self.vocabulary, self.sampler.length)
        forms = [self.pieces(token) for token in tokenizer.tokens]
        there = [place for place, form in enumerate(forms) if form]
        with self._precision():
            made = self.network([forms[place] for place in there])
        near = self._near(made, [forms[place] for place in there])
        tables = [
            self._table(number, rows.special, one, there, len(forms))
            for number, one in enumerate(made)
        ]
        # The base's passes are made in parts, so that its logits fit: their gradients meet here.
        leaves = [table.detach().requires_grad_(True) for table in tables]
        loss = 0.0
        for part in rows.parts(len(leaves[0])):
            with self._precision():
                one = self._likelihood(leaves, *part) / rows.predicted
            one.backward()
            loss += one.item()
        # Texts of one token, of which nothing is predicted, leave none.
        grads = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
        torch.autograd.backward([*tables, self.settings.near * near], [*grads, None])
        return {"loss": loss, "near_loss": near.item()}, rows.tokens

    def _table(
        self, number: int, special: Sequence[int], made: Tensor, there: Sequence[int], count: int
    ) -> Tensor:
        """Special tokens' rows, then those of the pieces; the mean row where nothing is known."""
        own = self.tables[number]
        if len(there) < count:
            whole = own.mean(0).repeat(count, 1)
            made = whole.index_copy(0, torch.tensor(there, device=own.device), made)
        return torch.cat([own[list(special)], made])

    def _near(self, made: Sequence[Tensor], forms: Sequence[Sequence[int]]) -> Tensor:
        """How far the tokens that are one piece are from its row."""
        alone = [place for place, form in enumerate(forms) if len(form) == 1]
        if not alone:
            return made[0].sum() * 0.0
        same = [forms[place][0] for place in alone]
        found = []
        for rows, own in zip(made, self.tables, strict=True):
            wanted = own[same]
            distance = (rows[alone] - wanted).square().sum(1).mean()
            found.append(distance / wanted.norm(dim=1).mean())
        return torch.stack(found).mean()

    def _likelihood(self, tables: Sequence[Tensor], ids: Tensor, lengths: Tensor) -> Tensor:
        """Sum of the cross-entropy of rows (b, T) of some lengths, with other tables."""
        ids, lengths = ids.to(self.device), lengths.to(self.device)
        inside = torch.arange(ids.shape[1], device=self.device) < lengths[:, None]
        kind = next(self.model.parameters()).dtype
        logits = torch.func.functional_call(
            self.model,
            {name: table.to(kind) for name, table in zip(self.names, tables, strict=True)},
            kwargs={"input_ids": ids, "attention_mask": inside.long(), "use_cache": False},
        ).logits
        labels = ids.masked_fill(~inside, -100)[:, 1:]
        return cross_entropy(
            logits[:, :-1].float().transpose(1, 2), labels, ignore_index=-100, reduction="sum"
        )

    def _precision(self) -> Any:
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.settings.precision == "bfloat16"
        )


@dataclass(frozen=True)
class Rows:
    """A batch in a sampled tokenizer's numbers, the special tokens' before the pieces'."""

    ids: list[list[int]]
    special: tuple[int, ...]
    """The base's tokens that begin and end rows."""

    @classmethod
    def of(
        cls,
        texts: Sequence[tuple[str, bool]],
        tokenizer: Sampled,
        vocabulary: Vocabulary,
        length: int,
    ) -> Rows:
        """Cut texts: a beginning, pieces, and an end where the text ends within `length`."""
        roles = vocabulary.roles
        begin, end = roles.get("bos", roles.get("cls")), roles.get("eos", roles.get("sep"))
        special = tuple(dict.fromkeys(one for one in (begin, end) if one is not None))
        ids = []
        for (_, whole), pieces in zip(
            texts, tokenizer.encode([text for text, _ in texts]), strict=True
        ):
            row = [] if begin is None else [special.index(begin)]
            row += [number + len(special) for number in pieces]
            row += [] if end is None or not whole else [special.index(end)]
            ids.append(row[:length])
        return cls([row for row in ids if len(row) > 1], special)

    @property
    def tokens(self) -> int:
        """All of them."""
        return sum(map(len, self.ids))

    @property
    def predicted(self) -> int:
        """All but the first of each row; 1 where there is none."""
        return max(self.tokens - len(self.ids), 1)

    def parts(self, vocabulary: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Padded numbers (b, T) and lengths (b,), few enough rows for their logits to fit."""
        order = sorted(self.ids, key=len)
        start = 0
        while start < len(order):
            stop = start + 1
            while (
                stop < len(order)
                and (stop + 1 - start) * len(order[stop]) * vocabulary <= LOGITS_PER_BATCH
            ):
                stop += 1
            part = order[start:stop]
            ids = torch.zeros(len(part), len(part[-1]), dtype=torch.long)
            for place, row in enumerate(part):
                ids[place, : len(row)] = torch.tensor(row)
            yield ids, torch.tensor([len(row) for row in part])
            start = stop


def keep(home: Path, network: Hypernetwork, optimizer: Any, step: int) -> None:
    """Write a checkpoint in the place of the last one."""
    from safetensors.torch import save_file

    home.mkdir(parents=True, exist_ok=True)
    tensors = dict(network.state_dict())
    for number, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{name}": value for name, value in state.items()}
    held = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    with new_file(home / "network.safetensors") as temporary:
        save_file(held, temporary, metadata={"step": json.dumps(step)})


def restore(home: Path, network: Hypernetwork, optimizer: Any) -> int:
    """Take up the checkpoint in `home`; steps done before it, 0 where there is none."""
    from safetensors import safe_open

    path = home / "network.safetensors"
    if not path.exists():
        return 0
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        step = json.loads(file.metadata()["step"])
    moments: dict[int, dict[str, Tensor]] = {}
    for name in [one for one in tensors if one.startswith("optimizer.")]:
        _, number, key = name.split(".")
        moments.setdefault(int(number), {})[key] = tensors.pop(name)
    network.load_state_dict(tensors)
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
    return step
