"""What is done to a gradient, entry by entry, before it is projected or compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Precondition = Callable[[str, Tensor], Tensor]
"""Takes a parameter's name and its gradients (b, n) in float32; gives back the same shape."""


@dataclass(frozen=True)
class Adam:
    """The step Adam would take on each row alone, in the direction of the gradient.

    m' / sqrt(v' + eps) with m' = beta1 m + (1 - beta1) g and v' = beta2 v + (1 - beta2) g^2: as
    LESS's code has it (`obtain_gradients_with_adam`), without Adam's bias correction and with eps
    inside the root.
    """

    m: Mapping[str, Tensor]
    """First moments by parameter name, float32."""
    v: Mapping[str, Tensor]
    """Second moments by parameter name, float32."""
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8

    @property
    def constants(self) -> tuple[float, float, float]:
        """beta1, beta2, eps."""
        return self.beta1, self.beta2, self.eps

    def moments(self, name: str) -> tuple[Tensor, Tensor]:
        """m and v of one parameter, flat."""
        return self.m[name].flatten(), self.v[name].flatten()

    def __call__(self, name: str, gradients: Tensor) -> Tensor:
        """(b, n) -> (b, n)."""
        m, v = (one.to(gradients.device) for one in self.moments(name))
        first = self.beta1 * m + (1 - self.beta1) * gradients
        second = self.beta2 * v + (1 - self.beta2) * gradients.square()
        return first / (second + self.eps).sqrt()


def sign(name: str, gradients: Tensor) -> Tensor:
    """The step of sign descent, Adam's in its first steps; (b, n) -> (b, n)."""
    return torch.sign(gradients)
