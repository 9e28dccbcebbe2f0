"""AdamW for folded parametrisations: clipping does not see how multipliers were folded.

The gradient of W' = c W is 1 / c of W's, so the global norm of the gradients would change with the
folding and with it what is clipped; here it is taken before folding, c times each gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from deltaloom.engine.parametrization import Parametrization, lora_rates
from deltaloom.engine.train import Companion, TrainSettings


class ScaledAdamW(torch.optim.AdamW):
    """AdamW whose groups have a `multiplier`; `clip` bounds the norm before folding, 0 does not."""

    def __init__(self, groups: list[dict[str, Any]], clip: float = 0.0, **settings: Any) -> None:
        super().__init__(groups, **settings)
        self.clip = clip

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step, after clipping."""
        if self.clip:
            factor = self.clip / (self.unfolded_norm() + 1e-6)  # torch's own clipping has it, too
            if factor < 1:
                for group in self.param_groups:
                    for parameter in group["params"]:
                        if parameter.grad is not None:
                            parameter.grad.mul_(factor)
        return super().step(closure)

    def unfolded_norm(self) -> float:
        """Norm of all gradients, each times its group's multiplier."""
        total = 0.0
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    total += (group["multiplier"] * parameter.grad.norm().item()) ** 2
        return total**0.5


class Scaled(Companion):
    """Brings a parametrisation's groups to `fit`, which must not clip itself."""

    def __init__(
        self,
        parametrization: Parametrization,
        *,
        weight_decay: float = 0.0,
        clip: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        self.parametrization = parametrization
        self.weight_decay, self.clip, self.betas, self.eps = weight_decay, clip, betas, eps

    def optimizer(self, model: Any, settings: TrainSettings) -> torch.optim.Optimizer:
        """AdamW with a learning rate for each rule."""
        groups = self.parametrization.groups(model, settings.lr, self.weight_decay, self.eps)
        return ScaledAdamW(groups, self.clip, lr=settings.lr, betas=self.betas)


class LoraScaled(Companion):
    """AdamW with learning rates of LoRA's factors as found at another width and rank.

    `width` and `rank` are the ratios to where the learning rate was found; parameters that are no
    factor keep it.
    """

    def __init__(self, width: float, rank: float, rslora: bool) -> None:
        self.rates = lora_rates(width, rank, "alpha/sqrt(r)" if rslora else "alpha/r")

    def optimizer(self, model: Any, settings: TrainSettings) -> torch.optim.Optimizer:
        """AdamW with a group for A, one for B and one for all else."""
        found: dict[float, list[torch.nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                factor = next((one for one in self.rates if f"lora_{one}." in name), None)
                rate = 1.0 if factor is None else self.rates[factor]
                found.setdefault(rate, []).append(parameter)
        groups = [{"params": own, "lr": settings.lr * rate} for rate, own in found.items()]
        return torch.optim.AdamW(groups, lr=settings.lr, weight_decay=settings.weight_decay)
