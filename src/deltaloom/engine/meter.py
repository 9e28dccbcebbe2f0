"""What a computation cost: tokens, estimated FLOPs and the peak of device memory.

FLOPs are `2 N` per token forward and, backward, `4 N` when all weights are trained or `2 N` when
only an adapter is, since frozen weights need no gradient of their own (Kaplan et al. 2020, arXiv
2001.08361, section 2.1: 2 N forward and twice that backward). N counts the weights a token is
multiplied with: the output layer is in it, tied or not; embedding look-ups, norms and biases are
not. Not covered: the products inside attention, which grow with the context; recomputation under
gradient checkpointing; packed 4-bit weights, whose stored shape is not their size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch

if TYPE_CHECKING:
    from deltaloom.core.run import Run


def matmul_parameters(model: Any) -> int:
    """N: the weights that one token is multiplied with; of experts, those it is routed to."""
    config = model.config.get_text_config()
    experts, share = _experts(config)
    # A tied output layer shares its tensor with the embedding and still is a product.
    found: dict[int, float] = {}
    for name, module in model.named_modules():
        # PEFT keeps the frozen twin of a module that it trains whole; only one of them runs.
        if isinstance(module, torch.nn.Embedding) or "original_module" in name.split("."):
            continue
        for weight in module.parameters(recurse=False):
            if weight.dim() < 2:
                continue
            one_of_many = weight.dim() == 3 and weight.shape[0] == experts
            routed = one_of_many or ".experts." in f".{name}."
            found[id(weight)] = weight.numel() * (share if routed else 1.0)
    return round(sum(found.values()))


def count_forward(run: Run, model: Any, tokens: int) -> dict[str, float]:
    """Enter a forward pass of `tokens` (without padding) in the run's ledger.

    Returns what was entered: `forward_tokens` and `flops`, ready for `Estimate.cost`. An upper
    bound where logits were made at few positions: the output layer is counted at every token.
    """
    spent = forward_cost(model, tokens)
    run.spend(**spent, **_peak(model))
    return spent


def forward_cost(model: Any, tokens: int) -> dict[str, float]:
    """What `count_forward` enters; for workers, which have no ledger."""
    return {"forward_tokens": float(tokens), "flops": 2.0 * matmul_parameters(model) * tokens}


def count_training(
    run: Run, model: Any, tokens: int, trainable: Literal["all", "adapter"] = "all"
) -> dict[str, float]:
    """Enter forward and backward of `tokens` (without padding) in the run's ledger.

    Returns what was entered: `forward_tokens`, `backward_tokens` and `flops`.
    """
    spent = training_cost(model, tokens, trainable)
    run.spend(**spent, **_peak(model))
    return spent


def training_cost(
    model: Any, tokens: int, trainable: Literal["all", "adapter"] = "all"
) -> dict[str, float]:
    """What `count_training` enters; for workers, which have no ledger."""
    per_weight = 6.0 if trainable == "all" else 4.0
    return {
        "forward_tokens": float(tokens),
        "backward_tokens": float(tokens),
        "flops": per_weight * matmul_parameters(model) * tokens,
    }


def _peak(model: Any) -> dict[str, float]:
    devices = {weight.device for weight in model.parameters() if weight.device.type == "cuda"}
    if not devices:
        return {}
    # One number for a model on several devices: the fullest decides whether it fits.
    return {"peak_device_bytes": float(max(map(torch.cuda.max_memory_allocated, devices)))}


def _experts(config: Any) -> tuple[int, float]:
    """Experts per layer (-1 for a dense model) and the share of them that meets a token."""
    used = getattr(config, "num_experts_per_tok", None)
    for name in ("num_local_experts", "num_experts", "n_routed_experts"):
        total = getattr(config, name, None)
        if used and isinstance(total, int) and total > 0:
            return total, used / total
    return -1, 1.0
