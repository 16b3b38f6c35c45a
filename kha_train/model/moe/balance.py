"""Load balancing of experts: updates of the selection bias, the auxiliary losses, and statistics of the balance of a
step.

All auxiliary losses are E * sum_i F_i P_i, with F_i the share of the choices that fell on expert i and P_i the mean
share of its scores: 1 when balanced. They differ in the tokens over which F is counted. All are returned as sums over
tokens, so that a step divides by the tokens of its global batch.
"""

# L layers   E experts   N tokens   B rows   T tokens of a row   J chosen experts per token   M = T * J
# ... any leading dimensions

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kha_train.metric import Metric
from kha_train.model.attention.context import ContextRanks


def rms_update(bias_E: Tensor, load_E: Tensor, rate: float) -> Tensor:
    """The selection bias after one step: b - rate * (F - 1/E) / RMS(F - 1/E), its mean removed (Su 2025).

    `load_E` counts the tokens each expert received over the whole global batch; F is its share. A perfectly balanced
    (or empty) load leaves the bias unchanged. The mean has no effect, because selection depends only on differences.
    Works on [..., E].
    """
    excess_E = _excess(load_E, bias_E)
    rms = excess_E.square().mean(dim=-1, keepdim=True).sqrt()
    moved_E = bias_E - rate * torch.where(rms > 0, excess_E / rms, 0.0)
    return moved_E - moved_E.mean(dim=-1, keepdim=True)


def sign_update(bias_E: Tensor, load_E: Tensor, rate: float) -> Tensor:
    """b - rate * sign(F - 1/E) (Wang 2024): lowers every expert above its share, raises every one below. [..., E]."""
    return bias_E - rate * _excess(load_E, bias_E).sign()


def sign_zero_mean_update(bias_E: Tensor, load_E: Tensor, rate: float) -> Tensor:
    """b + rate * (sign(e) - mean(sign(e))), e = 1/E - F (Ling 2.0): as `sign_update`, but keeps the mean. [..., E]."""
    sign_E = -_excess(load_E, bias_E).sign()
    return bias_E + rate * (sign_E - sign_E.mean(dim=-1, keepdim=True))


BIAS_UPDATES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "rms": rms_update,
    "sign": sign_update,
    "sign_zero_mean": sign_zero_mean_update,
}
"""`moe.bias_update` -> (bias, load, rate) -> the bias after the step."""


def _excess(load_E: Tensor, bias_E: Tensor) -> Tensor:
    # Shares are compared as integers: a balanced load must give exactly 0, in fp32 too.
    load_E = load_E.double()
    total = load_E.sum(dim=-1, keepdim=True)
    return ((load_E - total / load_E.shape[-1]) / total.clamp(min=1.0)).to(bias_E.dtype)


def sequence_balance_loss(
    share_NE: Tensor,
    expert_NJ: Tensor,
    rows: int,
    real_N: Tensor | None = None,
    places: int = 0,
    context: ContextRanks | None = None,
) -> Tensor:
    """Summed over tokens, with F counted in each of `rows` rows (DeepSeek-V3, eq 17-20): independent of the split.

    `share_NE` are a token's scores over their sum. Tokens fill the rows, or lie at `real_N` of their `places`. With
    `context` they are a part of the rows, whose loads are summed over ranks; the result is the part of these tokens.
    """
    experts = share_NE.shape[-1]
    if real_N is not None:
        return _sequence_balance_loss_of_some(share_NE, expert_NJ, rows, real_N, places, context)
    expert_BM = expert_NJ.view(rows, -1)
    load_BE = torch.zeros(rows, experts, dtype=share_NE.dtype, device=share_NE.device)
    load_BE.scatter_add_(1, expert_BM, torch.ones_like(expert_BM, dtype=share_NE.dtype))
    share_BE, choices = share_NE.view(rows, -1, experts).sum(dim=1), expert_BM.shape[1]
    if context:
        load_BE, choices = context.total(load_BE), choices * context.size
    return experts / choices * (load_BE * share_BE).sum()


def _sequence_balance_loss_of_some(
    share_NE: Tensor, expert_NJ: Tensor, rows: int, real_N: Tensor, places: int, context: ContextRanks | None
) -> Tensor:
    """For rows with unequal numbers of tokens, or none. Only integers are summed by index, so the order does not
    matter.
    """
    experts, row_N = share_NE.shape[-1], real_N.div(places // rows, rounding_mode="floor")
    load_M = share_NE.new_zeros(rows * experts)
    place_NJ = row_N.unsqueeze(-1) * experts + expert_NJ
    load_BE = load_M.scatter_add_(0, place_NJ.flatten(), torch.ones_like(expert_NJ, dtype=share_NE.dtype).flatten())
    load_BE = context.total(load_BE.view(rows, experts)) if context else load_BE.view(rows, experts)
    choices_B = load_BE.sum(dim=1).clamp(min=1.0)
    spread_BTE = share_NE.new_zeros(places, experts).index_copy(0, real_N, share_NE).view(rows, -1, experts)
    return (experts / choices_B * (load_BE * spread_BTE.sum(dim=1)).sum(dim=1)).sum()


def batch_balance_loss(share_NE: Tensor, load_E: Tensor) -> Tensor:
    """Summed over tokens, with F counted over these tokens (Switch Transformer, eq 4): the value depends on the
    split.
    """
    relative_E = load_E.to(share_NE.dtype) * (load_E.numel() / load_E.sum().clamp(min=1))
    return (share_NE.sum(dim=0) * relative_E).sum()


def expected_balance_loss(share_NE: Tensor, relative_E: Tensor) -> Tensor:
    """Summed over tokens, with given F: `relative_E` are loads over their mean, of other tokens."""
    return (share_NE.sum(dim=0) * relative_E).sum()


def relative_load(load_E: Tensor) -> Tensor:
    """Loads over their mean, 1 where nothing was routed, fp32 [..., E]."""
    mean_E = load_E.double().mean(dim=-1, keepdim=True)
    return torch.where(mean_E > 0, load_E.double() / mean_E, 1.0).float()


METRICS = (
    Metric("moe/maxvio", "1", "largest load of an expert / mean load (1: perfect balance)", layers="mean"),
    Metric("moe/load_cv", "1", "standard deviation of the experts' loads / mean load", layers="mean"),
    Metric("moe/dead_fraction", "fraction", "experts that received no token in the step, of all", layers="mean"),
    Metric("moe/load_entropy", "1", "entropy of the experts' load shares / log(experts) (1: even)", layers="mean"),
    Metric("moe/bias_range", "1", "largest - smallest selection bias, as the step was routed", layers="max"),
    Metric("moe/maxvio_worst", "1", "largest load of an expert / mean load; the worst layer"),
)
"""What `balance_metrics` makes of a step."""
AUXILIARY_LOSS = Metric(
    "moe/auxiliary_loss",
    "1",
    "E sum_i F_i P_i as moe.auxiliary_loss.scope counts it, unweighted; mean over layers (1: even)",
)
Z_LOSS = Metric("moe/z_loss", "1", "squared logsumexp of the router's logits, unweighted; mean over tokens and layers")


class LoadStatistics(NamedTuple):
    """Balance statistics of one step, fp32 [L], one for each layer with experts.

    `maxvio` largest load / mean load (1 = balanced) · `load_cv` standard deviation / mean · `dead_fraction` experts
    with no token · `load_entropy` entropy of the shares / log E (1 = balanced, or a single expert) · `bias_range`
    spread of the selection bias.
    """

    maxvio: Tensor
    load_cv: Tensor
    dead_fraction: Tensor
    load_entropy: Tensor
    bias_range: Tensor


def load_statistics(load_LE: Tensor, bias_LE: Tensor) -> LoadStatistics:
    """The statistics of one step from its loads (whole global batch) and the selection biases, on their device."""
    load_LE = load_LE.float()
    mean_L = load_LE.mean(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
    share_LE = load_LE / load_LE.sum(dim=-1, keepdim=True).clamp(min=1.0)
    entropy_L = torch.special.entr(share_LE).sum(dim=-1)
    return LoadStatistics(
        maxvio=load_LE.amax(dim=-1) / mean_L,
        load_cv=load_LE.std(dim=-1, correction=0) / mean_L,
        dead_fraction=(load_LE == 0).float().mean(dim=-1),
        # The share of a single expert is always balanced.
        load_entropy=entropy_L / math.log(load_LE.shape[-1]) if load_LE.shape[-1] > 1 else torch.ones_like(entropy_L),
        bias_range=bias_LE.amax(dim=-1) - bias_LE.amin(dim=-1),
    )


def balance_metrics(load_LE: Tensor, bias_LE: Tensor) -> dict[str, float | list[float]]:
    """The `moe/` entries of a step's record: one number for all layers and, under `_by_layer`, one per layer.

    Means over the layers, except for the bias range, which is the largest. Empty for a model without experts.
    """
    if load_LE.shape[0] == 0:
        return {}
    by_layer = torch.stack(load_statistics(load_LE, bias_LE)).tolist()
    metrics: dict[str, float | list[float]] = {}
    for name, values in zip(LoadStatistics._fields, by_layer, strict=True):
        metrics[f"moe/{name}"] = max(values) if name == "bias_range" else sum(values) / len(values)
        metrics[f"moe/{name}_by_layer"] = values
    metrics["moe/maxvio_worst"] = max(by_layer[LoadStatistics._fields.index("maxvio")])
    return metrics
