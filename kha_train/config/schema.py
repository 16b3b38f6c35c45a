"""The configuration of a run: one frozen dataclass tree, the only schema there is.

The YAML groups under `configs/` hold values for these fields and nothing else. The tree mirrors the module tree. Needs
no torch. Attention bases and interactions bring their own options (see `options.py`), chosen by `name` through
`registry.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from kha_train.config.backends import BackendName
from kha_train.config.options import BaseOptions, InteractionOptions, Positions, QkNorm


@dataclass(frozen=True, kw_only=True)
class RunSection:
    """What is run: where it is kept, for how many optimiser steps, from which seed."""

    dir: str
    name: str
    steps: int
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class ModelSection:
    """The decoder's shape. `seq_len` is the number of tokens of one training row (T)."""

    name: str
    layers: int
    hidden_size: int
    query_heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    seq_len: int
    tie_embeddings: bool = True
    norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    init_std: float = 0.02
    scale_residual_init: bool = True
    loss_chunk_tokens: int = 1024


@dataclass(frozen=True, kw_only=True)
class AttentionSection:
    """Attention = base x interaction, computed by one backend of softmax(QK)V.

    `positions`: `rope` turns queries and keys, `alibi` lowers scores by distance, `learned` adds a vector for each
    place in the row or document to the embedding, `none` leaves the order to the causal mask.
    """

    name: str
    base: BaseOptions
    interaction: InteractionOptions
    qk_norm: QkNorm = "per_head"
    positions: Positions = "rope"
    backend: BackendName = "sdpa"


@dataclass(frozen=True, kw_only=True)
class MoeSection:
    """Mixture of experts in every layer: sigmoid router, loss-free balancing, dropless SwiGLU experts."""

    experts: int
    top_k: int
    expert_width: int
    backend: Literal["grouped", "loop"] = "grouped"
    routed_scaling: float = 2.5
    bias_update_rate: float = 1e-3


@dataclass(frozen=True, kw_only=True)
class SourceSection:
    """One dataset of a mixture: `weight` is its share of the samples, relative to the other sources."""

    name: str
    path: str
    weight: float


@dataclass(frozen=True, kw_only=True)
class PhaseSection:
    """From sample `start_sample` on the sources have these `weights`, in their order."""

    start_sample: int
    weights: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class DataSection:
    """Tokenised shards and the batch made of them. `global_batch_size` counts rows of `model.seq_len` tokens.

    `train` is one dataset; for several leave it empty and list `sources`, whose weights `phases` may change later.
    `reader` is how local files are read, `prefetch` how many steps a thread reads ahead.
    """

    name: str
    train: str
    validation: str
    global_batch_size: int
    sources: tuple[SourceSection, ...] = ()
    phases: tuple[PhaseSection, ...] = ()
    isolate_documents: bool = True
    packing: Literal["concat", "best_fit"] = "concat"
    shuffle: Literal["global", "block"] = "global"
    reader: Literal["pread", "memory_map"] = "pread"
    prefetch: int = 0
    check_crc: bool = True


@dataclass(frozen=True, kw_only=True)
class ScheduleSection:
    """Learning rate over steps: linear warm-up, then `cosine`, or `wsd` (constant, then linear decay at the end).

    `warmup` and `decay` are shares of `run.steps`, `final` a share of the peak rate. `decay` is read by `wsd` alone.
    """

    name: Literal["cosine", "wsd"] = "cosine"
    warmup: float = 0.05
    decay: float = 0.2
    final: float = 0.1


@dataclass(frozen=True, kw_only=True)
class OptimSection:
    """AdamW with decoupled weight decay on matrices, and clipping of the global gradient norm."""

    lr: float
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    grad_clip: float = 1.0
    schedule: ScheduleSection = field(default_factory=ScheduleSection)


@dataclass(frozen=True, kw_only=True)
class EngineSection:
    """How the step is executed: ZeRO stage, precision, micro-batch, recomputation. Never what it computes."""

    zero_stage: Literal[1, 2, 3]
    micro_batch_size: int
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    grad_accum_dtype: Literal["fp32", "bf16"] = "fp32"
    activation_checkpointing: Literal["none", "full"] = "none"
    reduce_bucket_elements: int = 50_000_000
    collective_timeout_seconds: float = 1800.0


@dataclass(frozen=True, kw_only=True)
class CheckpointSection:
    """When a checkpoint is written and how many are kept. The last step always writes one."""

    every_steps: int
    keep_last: int = 2


@dataclass(frozen=True, kw_only=True)
class ValidationSection:
    """Bits per byte on held-out text: every so many steps (0: only at the end), over `rows` rows (0: all of them)."""

    every_steps: int
    rows: int = 0


@dataclass(frozen=True, kw_only=True)
class StabilitySection:
    """What to do about bad steps. A non-finite step is never applied; so many in a row end the run (exit 5)."""

    policy: Literal["observe"] = "observe"
    max_nonfinite_steps: int = 10


@dataclass(frozen=True, kw_only=True)
class WandbSection:
    """The W&B mirror. `auto` is online with a key and a network, offline otherwise; never fatal."""

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    project: str = "kha_train"
    entity: str = ""
    group: str = ""
    tags: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class TelemetrySection:
    """What is shown beside the record. `peak_tflops` (0: look up or measure) is the denominator of MFU."""

    console: Literal["auto", "lines", "progress", "quiet"] = "auto"
    peak_tflops: float = 0.0
    wandb: WandbSection = field(default_factory=WandbSection)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything a run is made of; what `compose` returns and `<run.dir>/config.yaml` holds."""

    run: RunSection
    model: ModelSection
    attention: AttentionSection
    moe: MoeSection
    data: DataSection
    optim: OptimSection
    engine: EngineSection
    checkpoint: CheckpointSection
    validation: ValidationSection
    stability: StabilitySection
    telemetry: TelemetrySection
