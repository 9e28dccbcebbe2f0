"""Optimizers whose state belongs to elements that may be exchanged: AdamW with ages, and SM3."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from deltaloom.core.adapters._sparse_product import Layout


class AgedAdamW(torch.optim.Optimizer):
    """AdamW with a step count per element, so that elements may join at any time.

    m <- b1 m + (1 - b1) g, v <- b2 v + (1 - b2) g^2, a <- a + 1, and the value changes by
    -lr (m / (1 - b1^a) / (sqrt(v / (1 - b2^a)) + eps) + weight_decay value). With equal ages this
    is torch's AdamW.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore
        """Update every parameter that has a gradient; state is (n,) as the parameter is."""
        for group in self.param_groups:
            (b1, b2), lr = group["betas"], group["lr"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state.update({name: torch.zeros_like(p) for name in ("age", "mean", "square")})
                age, mean, square = state["age"], state["mean"], state["square"]
                age += 1
                mean.lerp_(p.grad, 1 - b1)
                square.mul_(b2).addcmul_(p.grad, p.grad, value=1 - b2)
                p.mul_(1 - lr * group["weight_decay"])
                # 1 - b^age, which float32 would round where b^age is near one
                first, second = (-torch.expm1(age * math.log(b)) for b in (b1, b2))
                root = (square / second).sqrt_().add_(group["eps"])
                p.addcdiv_(mean / first, root, value=-lr)


class CoverSM3(torch.optim.Optimizer):
    """SM3 (Anil et al. 2019, SM3-II) on the elements of matrices, with one cover a row and column.

    u = min(R[row], C[column]) + g^2; R and C take the largest u of their elements; the value
    changes by -lr (g / sqrt(u + eps) + weight_decay value).
    """

    def __init__(
        self,
        params: Any,
        places: dict[Tensor, tuple[Any, Layout]],
        lr: float,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "eps": eps, "weight_decay": weight_decay})
        self.places = places
        """Parameter -> a function that gives its flat indices now, and the layout they are in."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore
        """Update every parameter that has a gradient; state is R (out,) and C (in,)."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                indices, layout = self.places[p][0](), self.places[p][1]
                state = self.state[p]
                if not state:
                    out, into = layout.columns, layout.rows
                    if not layout.transposed:
                        out, into = into, out
                    state["rows"], state["columns"] = p.new_zeros(out), p.new_zeros(into)
                rows, columns = layout.places(indices)
                cover = torch.minimum(state["rows"][rows], state["columns"][columns])
                cover.addcmul_(p.grad, p.grad)
                state["rows"].scatter_reduce_(0, rows, cover, "amax")
                state["columns"].scatter_reduce_(0, columns, cover, "amax")
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.addcmul_(p.grad, (cover + group["eps"]).rsqrt(), value=-group["lr"])
