"""Per-example gradients of a whole ragged batch in one forward and one backward pass.

For a linear module y = W a the gradient of example i is sum_t g_it a_it' with g the gradient at
the module's output. Hooks keep a and g; examples of a batch share no computation, so one backward
pass of the summed losses gives every example's g.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deltaloom.core.encoding import Encoded
from deltaloom.core.errors import InputError
from deltaloom.engine.train import collate

TOKENS = 4096
"""Padded tokens per batch at most."""
FLOATS = 2**22
"""Gradient entries per batch at most: 16 MiB in float32, so that what follows stays in cache."""


def parameter_names(model: nn.Module) -> list[str]:
    """Trainable parameters in the order their gradients are concatenated.

    Raises InputError when one is not the weight of a linear module, as LoRA's factors are.
    """
    linear = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    for name in names:
        if name not in linear:
            raise InputError(f"per-example gradients need linear modules, and {name} is none")
    return names


def per_example(
    model: Any, rows: Sequence[Encoded], pad_id: int
) -> Iterator[tuple[list[int], Tensor]]:
    """Yield (row numbers, gradients (b, D) in float32) batch by batch, rows sorted by length.

    The loss of a row is its mean cross-entropy over response tokens, the model in evaluation
    mode. D is the concatenation of the parameters named by `parameter_names`.
    """
    names = parameter_names(model)
    modules = dict(model.named_modules())
    parts = [modules[name.removesuffix(".weight")] for name in names]
    size = sum(part.weight.numel() for part in parts)
    device = parts[0].weight.device
    model.eval()
    with _Capture(parts) as capture:
        for numbers in _batches(rows, max(1, FLOATS // size)):
            batch = collate([rows[i] for i in numbers], pad_id)
            loss = summed_loss(model, {key: value.to(device) for key, value in batch.items()})
            loss.backward()
            gradients = [capture.gradient(part).flatten(1) for part in parts]
            model.zero_grad(set_to_none=True)
            yield numbers, torch.cat(gradients, dim=1)


def summed_loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Sum over rows of the mean cross-entropy of each row's labelled tokens."""
    logits = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
    ).logits[:, :-1]  # (b, T - 1, V)
    labels = batch["labels"][:, 1:]  # (b, T - 1)
    row, position = (labels != -100).nonzero(as_tuple=True)
    losses = nn.functional.cross_entropy(
        logits[row, position].float(), labels[row, position], reduction="none"
    )
    counts = torch.bincount(row, minlength=len(labels))
    return (losses / counts[row]).sum()


class _Capture:
    """Inputs and output gradients of some linear modules during one forward and backward."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.modules = modules
        self.inputs: dict[nn.Module, Tensor] = {}
        self.outputs: dict[nn.Module, Tensor] = {}

    def __enter__(self) -> _Capture:
        self.handles = [module.register_forward_hook(self._keep) for module in self.modules]
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self.handles:
            handle.remove()

    def _keep(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.inputs[module] = inputs[0].detach()
        output.register_hook(self._store(module))

    def _store(self, module: nn.Module) -> Callable[[Tensor], None]:
        def store(gradient: Tensor) -> None:
            self.outputs[module] = gradient

        return store

    def gradient(self, module: nn.Module) -> Tensor:
        """(b, out, in) for the last batch; the kept tensors are freed."""
        a, g = self.inputs.pop(module), self.outputs.pop(module)
        return torch.einsum("bto,bti->boi", g.float(), a.float())


def _batches(rows: Sequence[Encoded], most: int) -> Iterator[list[int]]:
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i].input_ids), i))
    batch: list[int] = []
    for i in order:
        # Sorted by length, so the newest row is the widest.
        if batch and (len(batch) == most or (len(batch) + 1) * len(rows[i].input_ids) > TOKENS):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
