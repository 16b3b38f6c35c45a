"""Measures possible causes of a spike before the step: the gradients still exist, and the weights are unchanged.

Collective, because every rank holds a part of the data. It costs one forward of one row and changes nothing: a probed
step is bit-identical to one that was not probed.
"""

# B rows  T tokens  U attended tokens  H query heads  G key/value heads  N = H / G  K head width  L layers  E experts
# P parameters of interactions  S document borders

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from kha_train.data.rows.batch import Batch
from kha_train.engine.contract import Engine
from kha_train.metric import Metric

IN_IT = ".interaction."
"""Part of the name of every parameter of an interaction."""
METRICS = (
    Metric("attn/max_logit", "1", "largest attention logit of all layers over sampled queries; on probed steps"),
    Metric(
        "kha/from_identity",
        "1",
        "largest Frobenius distance of an interaction's matrix (gates aside) from the identity; on probed steps",
    ),
)
SAMPLED_QUERIES = 64
"""Attention logits are computed for this many positions, evenly spread over the row, against all keys before them."""


def probe(engine: Engine, batch: Batch, load_LE: Tensor) -> dict[str, Any]:
    """The evidence about a step between its last micro-batch and its update, as plain values.

    `grad_norms` by parameter group (one per layer); `max_logits`, the largest attention logit of each layer over
    sampled queries of each rank's first row; `router`, the load (of the global batch) and the selection bias of each
    layer with experts; `interactions`, the norm of each parameter of an interaction, and the distance of square ones
    from the identity.
    """
    return {
        "grad_norms": engine.gradient_norms(),
        "max_logits": _largest_logits(engine, batch),
        "router": _router(load_LE, engine.decoder.selection_bias_LE()),
        "interactions": _interactions(engine),
    }


def probe_metrics(evidence: dict[str, Any]) -> dict[str, float]:
    """The few numbers of the evidence for a metrics line."""
    metrics = {"attn/max_logit": max(evidence["max_logits"])} if evidence["max_logits"] else {}
    # Gates start at zero and not at the identity.
    matrices = [entry for name, entry in evidence["interactions"].items() if "gate" not in name.split(".")]
    distances = [entry["from_identity"] for entry in matrices if "from_identity" in entry]
    return metrics | ({"kha/from_identity": max(distances)} if distances else {})


def _largest_logits(engine: Engine, batch: Batch) -> list[float]:
    found: list[Tensor] = []
    first_row = next(batch.micro_batches(1))
    borders_S = first_row.cu_seqlens_S.to(engine.world.device)
    watched = _watched(engine.decoder, found.append, borders_S, first_row.whole.token_count)
    with _as_written(engine), watched:
        engine.evaluate(first_row)
    if not found:
        return []
    world = engine.world
    # The maximum over ranks as a sum: each rank fills its own row.
    table = torch.zeros(world.size, len(found), device=world.device)
    table[world.rank] = torch.stack(found).float()
    return world.sum_(table).amax(0).tolist()


def _as_written(engine: Engine) -> AbstractContextManager[Any]:
    """Inside the `with` block, compiled blocks run uncompiled. Otherwise the hooks would be traced into new graphs each
    time, until the compiler gives up on all blocks.
    """
    return torch.compiler.set_stance("force_eager") if engine.config.engine.compile != "none" else nullcontext()


@contextmanager
def _watched(
    decoder: torch.nn.Module, report: Callable[[Tensor], None], cu_seqlens_S: Tensor, tokens: int
) -> Iterator[None]:
    """Inside the `with` block, every call of an attention backend first reports its largest logit among the `tokens` at
    the beginning of the row; the rest is padding.
    """
    watched = [module for module in decoder.modules() if "attend" in vars(module)]
    before: list[Callable[..., Tensor]] = [vars(module)["attend"] for module in watched]

    def watching(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(q_BTHK: Tensor, k_BUGK: Tensor, *rest: Any) -> Tensor:
            scale = next((value for value in rest if isinstance(value, float)), q_BTHK.shape[-1] ** -0.5)
            report(_largest_logit(q_BTHK[0, :tokens], k_BUGK[0, :tokens], cu_seqlens_S, scale))
            return attend(q_BTHK, k_BUGK, *rest)

        return call

    for module, attend in zip(watched, before, strict=True):
        vars(module)["attend"] = watching(attend)
    try:
        yield
    finally:
        for module, attend in zip(watched, before, strict=True):
            vars(module)["attend"] = attend


def _largest_logit(q_THK: Tensor, k_UGK: Tensor, cu_seqlens_S: Tensor, scale: float) -> Tensor:
    """max over sampled t and all u <= t of the same document of q_t . k_u * scale, a scalar."""
    length, groups = len(q_THK), k_UGK.shape[1]
    at = torch.linspace(0, length - 1, min(SAMPLED_QUERIES, length), device=q_THK.device).round().long()
    position = torch.arange(length, dtype=cu_seqlens_S.dtype, device=q_THK.device)
    document = torch.searchsorted(cu_seqlens_S, position, right=True)
    allowed = (position[at, None] >= position) & (document[at, None] == document)
    q_TGNK = q_THK[at].unflatten(1, (groups, -1)).float()
    logits_GNTU = torch.einsum("tgnk,ugk->gntu", q_TGNK, k_UGK.float()) * scale
    return logits_GNTU.masked_fill(~allowed, -torch.inf).amax()


def _router(load_LE: Tensor, bias_LE: Tensor) -> list[dict[str, float]]:
    """One entry per layer with experts."""
    entries = []
    for load_E, bias_E in zip(load_LE.tolist(), bias_LE.tolist(), strict=True):
        mean = sum(load_E) / len(load_E)
        entries.append(
            {
                "maxvio": max(load_E) / mean if mean else 0.0,
                "busiest": load_E.index(max(load_E)),
                "dead": load_E.count(0.0),
                "bias_min": min(bias_E),
                "bias_max": max(bias_E),
            }
        )
    return entries


def _interactions(engine: Engine) -> dict[str, dict[str, float]]:
    """Norms computed from the fp32 masters; each rank owns a part of them."""
    shapes = {name: shape for name, shape in engine.shapes.items() if IN_IT in name}
    names = list(shapes)
    if not names:
        return {}
    squares_P2 = torch.zeros(len(names), 2, dtype=torch.float64, device=engine.world.device)
    for fragment in engine.fragments():
        if fragment.name not in names:
            continue
        values = fragment.views["master"].double()
        place = torch.arange(fragment.start, fragment.start + len(values), device=values.device)
        width = fragment.shape[-1]
        identity = (place % width == place // width % width).double()
        both = torch.stack([values.square().sum(), (values - identity).square().sum()])
        squares_P2[names.index(fragment.name)] += both
    norms = engine.world.sum_(squares_P2).sqrt().tolist()
    return {
        name: {"norm": norm, "from_identity": far} if shapes[name][-1:] == shapes[name][-2:-1] else {"norm": norm}
        for name, (norm, far) in zip(names, norms, strict=True)
    }
