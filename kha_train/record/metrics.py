"""Every key of a `metrics.jsonl` line with its unit and definition: the one table that docs and reports print."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """What a number means. `timing` marks those that depend on when and where a step ran, not on what it computed.
    Without `mirrored` it stays in the record: its length grows with the model.
    """

    unit: str
    meaning: str
    timing: bool = False
    mirrored: bool = True


METRICS: dict[str, Metric] = {
    "step": Metric("steps", "finished optimiser steps, this one included (the first line says 1)"),
    "attempt": Metric("count", "which start of this run directory computed the step (the first is 1)", timing=True),
    "time": Metric("s", "seconds since 1970-01-01 UTC when the line was written", timing=True),
    "samples_first": Metric("row", "first global sample number of the step's batch"),
    "samples_last": Metric("row", "last global sample number of the step's batch"),
    "tokens": Metric(
        "tokens", "places read since step 0: rows of the global batch x sequence length, padding included"
    ),
    "train/loss": Metric(
        "nats/token", "token cross-entropy summed over the global batch / its unmasked labels; no auxiliary term"
    ),
    "train/grad_norm": Metric("1", "L2 norm of the gradient over all parameters and ranks, before clipping"),
    "train/grad_clipped": Metric(
        "0/1", "1 when the norm was above optim.grad_clip, or ZClip's limit, and the gradient was scaled down"
    ),
    "train/zclip_limit": Metric("1", "norm that ZClip let the gradient have: its own unless it stood out"),
    "train/skipped": Metric("0/1", "1 when the update was not applied (not finite, or refused by stability.policy)"),
    "train/skipped_steps": Metric("steps", "updates not applied since step 0"),
    "train/nonfinite_steps": Metric("steps", "steps with a non-finite loss or norm since step 0"),
    "train/lr": Metric("1", "learning rate of the step"),
    "train/step_seconds": Metric("s", "wall time of the step, waiting for data included", timing=True),
    "train/tokens_per_second": Metric(
        "tokens/s", "places of the global batch (`tokens` of the step) / train/step_seconds", timing=True
    ),
    "train/mfu": Metric(
        "fraction",
        "training FLOPs per token x tokens/s / (peak FLOP/s of one rank x ranks); neither recomputation nor head "
        "interactions are counted",
        timing=True,
    ),
    "data/padding": Metric(
        "fraction", "places of the global batch that hold no token (packing=best_fit, where there is any)"
    ),
    "data/wait_seconds": Metric("s", "part of the step spent waiting for rank 0's own batch", timing=True),
    "data/agreement_seconds": Metric(
        "s", "part of the step in which rank 0, its batch at hand, waited for those of the other ranks", timing=True
    ),
    "checkpoint/stall_seconds": Metric(
        "s", "time training stood still for checkpoints since the line before (rank 0)", timing=True
    ),
    "checkpoint/failures": Metric("count", "saves of this attempt that failed", timing=True),
    "memory/peak_gib": Metric(
        "GiB", "most memory of rank 0 since start: resident set on a CPU, allocated by torch on CUDA", timing=True
    ),
    "moe/maxvio_worst": Metric("1", "largest load of an expert / mean load; the worst layer"),
    "moe/auxiliary_loss": Metric(
        "1", "E sum_i F_i P_i as moe.auxiliary_loss.scope counts it, unweighted; mean over layers (1: even)"
    ),
    "moe/z_loss": Metric("1", "squared logsumexp of the router's logits, unweighted; mean over tokens and layers"),
    **{
        f"moe/{name}_by_layer": Metric(unit, f"moe/{name} of every layer that has experts, a list", mirrored=False)
        for name, unit in (
            ("maxvio", "1"),
            ("load_cv", "1"),
            ("dead_fraction", "fraction"),
            ("load_entropy", "1"),
            ("bias_range", "1"),
        )
    },
    "moe/maxvio": Metric("1", "largest load of an expert / mean load; mean over layers (1: perfect balance)"),
    "moe/load_cv": Metric("1", "standard deviation of the experts' loads / mean load; mean over layers"),
    "moe/dead_fraction": Metric("fraction", "experts that received no token in the step, of all experts of all layers"),
    "moe/load_entropy": Metric("1", "entropy of the experts' load shares / log(experts); mean over layers (1: even)"),
    "moe/bias_range": Metric(
        "1", "largest - smallest selection bias of a layer, as the step was routed; largest over layers"
    ),
    "spike/z": Metric("1", "(loss - m) / s; m: what the trend of the last 128 losses outside events expects"),
    "spike/open": Metric("0/1", "1 while an event is open after the step"),
    "spike/events_total": Metric("count", "events so far, the open one included"),
    "spike/narrow_total": Metric("count", "closed events of at most 10 steps"),
    "spike/wide_total": Metric("count", "closed events of more than 10 steps"),
    "spike/unrecovered_total": Metric("count", "events given up after 2,000 steps, or cut short by a planned change"),
    "spike/olmo_loss_score": Metric(
        "%", "steps whose loss is 7 sd or more from the mean of the previous 1,000, of those judged (OLMo 2)"
    ),
    "spike/olmo_loss_score_w10k": Metric("%", "the same over the last 10,000 judged steps"),
    "spike/olmo_loss_up_score": Metric("%", "as spike/olmo_loss_score, upward only"),
    "spike/olmo_gnorm_score": Metric("%", "as spike/olmo_loss_score, of train/grad_norm"),
    "spike/olmo_gnorm_score_w10k": Metric("%", "the same over the last 10,000 judged steps"),
    "spike/z128_loss": Metric("1", "(loss - mean) / sd of the previous 128"),
    "spike/z128_gnorm": Metric("1", "(train/grad_norm - mean) / sd of the previous 128"),
    "spike/z128_flag": Metric("0/1", "1 when either of the two is above 6 (OLMo-core's rule)"),
    "attn/max_logit": Metric("1", "largest attention logit of all layers over sampled queries; on probed steps"),
    "kha/from_identity": Metric(
        "1", "largest Frobenius distance of an interaction's matrix (gates aside) from the identity; on probed steps"
    ),
    "validation/loss": Metric("nats/token", "token cross-entropy on the validation rows / their unmasked labels"),
    "validation/bits_per_byte": Metric(
        "bits/byte",
        "validation cross-entropy in bits / bytes of text behind the unmasked labels; absent for ids imported without "
        "a tokenizer",
    ),
}
"""Keys of a metrics line. Other keys are recorded too, but have no definition to print."""

RECORD_ONLY: frozenset[str] = frozenset(name for name, metric in METRICS.items() if not metric.mirrored)
"""Keys that mirrors leave out."""

TIMING_KEYS: frozenset[str] = frozenset(name for name, metric in METRICS.items() if metric.timing)
"""Keys that may differ between a resumed run and an unbroken one; every other key is equal bit for bit."""
