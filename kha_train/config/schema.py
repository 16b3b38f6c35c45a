"""The configuration of a run: one frozen dataclass tree, the only schema.

The YAML groups under `configs/` hold values for these fields and nothing else. The tree mirrors the module tree. Needs
no torch. Attention bases, interactions and optimisers bring their own options, which stand in `kha_train/variants` and
are chosen by `name`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from kha_train.config.batch_sizes import BatchSizes
from kha_train.config.surroundings import ClusterSection, ProfileSection, TelemetrySection
from kha_train.variants import optimizer
from kha_train.variants.attention import BaseOptions, HeadShape, InteractionOptions, Positions, QkNorm
from kha_train.variants.backends import BackendName
from kha_train.variants.task import TaskOptions

# The sections that stand in the header of the optimisers belong to this tree like the others.
OptimSection = optimizer.OptimSection
ScheduleSection = optimizer.ScheduleSection


@dataclass(frozen=True, kw_only=True)
class RunSection:
    """The run itself: its directory, number of optimiser steps and seed.

    With the `name` `auto`, the run is named after its settings (`naming.py`), and `dir` follows the name. `init_from`
    names the directory or a checkpoint of another run; a new run starts with its weights. `branch_from` names one whose
    whole state a new run continues: weights, moments, place in the data, detectors. `steps` counts from the beginning
    of the first run, so a branch trains the steps after its checkpoint. After `max_minutes` (0: no limit) a process
    saves and stops, to be started again.
    """

    dir: str
    name: str
    steps: int
    seed: int = 0
    init_from: str = ""
    branch_from: str = ""
    max_minutes: float = 0.0


@dataclass(frozen=True, kw_only=True)
class ModelSection:
    """The decoder's shape. `seq_len` is the number of tokens of one training row (T).

    `partial_rotary_factor` is the share of dimensions that rotary embedding rotates, beginning with the first, in the
    part of a head that it acts on: the whole head, the rotary half (`gta`) or the rotary part (`mla`).

    `rope_scaling` and the settings of it, `rope_*`: see `Scaling` in `kha_train/model/rope.py`.
    """

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
    partial_rotary_factor: float = 1.0
    rope_scaling: Literal["none", "linear", "yarn"] = "none"
    rope_factor: float = 1.0
    rope_original_seq_len: int = 0
    rope_beta_fast: float = 32.0
    rope_beta_slow: float = 1.0
    rope_attention_factor: float | None = None
    init_std: float = 0.02
    scale_residual_init: bool = True
    loss_chunk_tokens: int = 1024


@dataclass(frozen=True, kw_only=True)
class AttentionSection:
    """Attention = base x interaction, computed by one backend of softmax(QK)V.

    `positions`: `rope` rotates queries and keys, `alibi` lowers scores with distance, `learned` adds a vector for each
    position in the row or document to the embedding, `none` leaves the order to the causal mask.
    """

    name: str
    base: BaseOptions
    interaction: InteractionOptions
    qk_norm: QkNorm = "per_head"
    positions: Positions = "rope"
    backend: BackendName = "sdpa"

    def heads(self) -> HeadShape:
        """The heads that the interaction acts on."""
        return self.base.heads()._replace(normed=self.qk_norm != "none")


@dataclass(frozen=True, kw_only=True)
class AuxiliaryLossSection:
    """A loss that pushes the router towards balanced loads: `weight` times its value in every layer, 0 for none.

    `scope` is the set of tokens over which loads are counted: each row (`sequence`), the whole global batch of the
    previous step (`previous_step`), or each micro-batch (`micro_batch`, so it depends on `engine.micro_batch_size`).
    """

    weight: float = 0.0
    scope: Literal["sequence", "previous_step", "micro_batch"] = "sequence"


@dataclass(frozen=True, kw_only=True)
class MoeSection:
    """Mixture of experts: a router, SwiGLU experts without capacity limit, load balancing with or without a loss.

    The first `dense_layers` layers have one feed-forward of `dense_width` instead; if all have, `experts` is 0.
    `shared_experts` of `expert_width` run for every token, besides the routed ones. With `expert_groups` above 1 a
    token chooses only among the experts of its best `top_groups` groups. `renormalize` divides the chosen scores by
    their sum. For the first `routing_warmup_steps` steps, random scores are blended into the router's.
    `routing_seed` is the seed of these scores (null: `run.seed`). The router's logits and scores are computed in
    `router_precision`; the selection biases and all that follows stay fp32.
    """

    experts: int
    top_k: int
    expert_width: int
    backend: Literal["grouped", "loop", "megablocks"] = "grouped"
    shared_experts: int = 0
    dense_layers: int = 0
    dense_width: int = 0
    score: Literal["sigmoid", "softmax"] = "sigmoid"
    router_precision: Literal["fp32", "bf16"] = "fp32"
    renormalize: bool = True
    routed_scaling: float = 2.5
    expert_groups: int = 1
    top_groups: int = 1
    bias_update: Literal["rms", "sign", "sign_zero_mean"] = "rms"
    bias_update_rate: float = 1e-3
    auxiliary_loss: AuxiliaryLossSection = field(default_factory=AuxiliaryLossSection)
    z_loss_weight: float = 0.0
    routing_warmup_steps: int = 0
    routing_seed: int | None = None


@dataclass(frozen=True, kw_only=True)
class SourceSection:
    """One dataset of a mixture: `weight` is its share of the samples, relative to the other sources."""

    name: str
    path: str
    weight: float


@dataclass(frozen=True, kw_only=True)
class PhaseSection:
    """From sample `start_sample` on, the sources have these `weights`, in the same order."""

    start_sample: int
    weights: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class BatchChangeSection:
    """From optimiser step `start_step` on, a step has `global_batch_size` rows. The first step of a run is step 1."""

    start_step: int
    global_batch_size: int


@dataclass(frozen=True, kw_only=True)
class DataSection:
    """Tokenised shards and the batch made of them. `global_batch_size` counts rows of `model.seq_len` tokens, those of
    a step before the first change in `batch_schedule`.

    `train` is one dataset; for several leave it empty and list `sources`, whose weights `phases` may change later.
    `seed` decides the order of the samples (null: `run.seed`), `skip_windows` which sample numbers are left out: pairs
    of the first one and the one after the last.
    `reader` is how local files are read, `prefetch` how many steps a thread reads ahead. Datasets may be URLs: blocks
    of them are kept in `cache_dir`, `cache_gib` GiB at most, for all processes of a node.
    """

    name: str
    train: str
    validation: str
    global_batch_size: int
    batch_schedule: tuple[BatchChangeSection, ...] = ()
    seed: int | None = None
    sources: tuple[SourceSection, ...] = ()
    phases: tuple[PhaseSection, ...] = ()
    skip_windows: tuple[tuple[int, int], ...] = ()
    isolate_documents: bool = True
    packing: Literal["concat", "best_fit"] = "concat"
    shuffle: Literal["global", "block"] = "global"
    reader: Literal["pread", "memory_map"] = "pread"
    prefetch: int = 0
    check_crc: bool = True
    cache_dir: str = "~/.cache/kha_train/data"
    cache_gib: float = 100.0

    @property
    def batch_sizes(self) -> BatchSizes:
        """The rows of every step."""
        changes = tuple((change.start_step, change.global_batch_size) for change in self.batch_schedule)
        return BatchSizes(self.global_batch_size, changes)


@dataclass(frozen=True, kw_only=True)
class EngineSection:
    """How the step is executed: ZeRO stage, precision, micro-batch, recomputation.

    `name` selects the engine: `deepspeed`, `plain` (one process, for tests), or a package of `kha_train/engine`.
    Of these `precision`, `grad_accum_dtype` and `moment_dtype` change results by rounding, and so does the micro-batch
    under `moe.auxiliary_loss.scope: micro_batch` (a resumed run may not change it then). The others change at most the
    last bits of a sum. A rank without progress for `hang_timeout_seconds` (after the first step) writes its stacks and
    ends with exit code 75. Every `audit_every` steps (0: never) ranks compare the values that must be equal on all of
    them, to detect corrupted memory. Under ZeRO 3, each group of `hpz_partition_size` ranks (the GPUs of a node) holds
    another copy of the weights. Groups of `expert_parallel` ranks share the experts of every layer, groups of
    `context_parallel` ranks every row, each a part of its tokens. `kernels` selects torch's operators or kernels in
    Triton: `auto` is `torch` on a CPU, and on CUDA whatever is faster at the start of a run and agrees with torch.
    """

    name: str = "deepspeed"
    zero_stage: Literal[1, 2, 3]
    micro_batch_size: int
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    grad_accum_dtype: Literal["fp32", "bf16"] = "fp32"
    moment_dtype: Literal["fp32", "bf16"] = "fp32"
    kernels: Literal["auto", "torch", "triton"] = "auto"
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    compile: Literal["none", "block"] = "none"
    reduce_bucket_elements: int = 50_000_000
    hpz_partition_size: int = 1
    expert_parallel: int = 1
    context_parallel: int = 1
    collective_timeout_seconds: float = 1800.0
    hang_timeout_seconds: float = 600.0
    audit_every: int = 100


@dataclass(frozen=True, kw_only=True)
class CheckpointSection:
    """When a checkpoint is written, how, and which are kept. The last step always writes one.

    Besides `every_steps`, one is written `every_minutes` (0: never) after the last. The `keep_last` newest are kept,
    and one every `keep_every_steps` (0: none). `background` writes while training continues, from a copy in host
    memory. Training continues after a failed save; `max_failures` in a row end it. Every `ring_steps` (0: never) the
    state is copied to host memory, which holds the last two copies; they are written when a loss event opens.
    """

    every_steps: int
    every_minutes: float = 0.0
    keep_last: int = 2
    keep_every_steps: int = 0
    background: bool = True
    max_failures: int = 3
    ring_steps: int = 0


@dataclass(frozen=True, kw_only=True)
class ResumeSection:
    """How strictly a resumed run is checked against its checkpoint.

    `allow_changes` names settings (or whole sections, or `data_content_id`) that may differ from the checkpoint's. With
    `strict` a checkpoint that fails verification ends the run (exit 4) instead of being skipped.
    """

    allow_changes: tuple[str, ...] = ()
    strict: bool = False


@dataclass(frozen=True, kw_only=True)
class ValidationSetSection:
    """A named dataset of held-out text, such as a domain."""

    name: str
    path: str


@dataclass(frozen=True, kw_only=True)
class ValidationSection:
    """Bits per byte on held-out text: every so many steps (0: only at the end), over `rows` rows (0: all of them) of
    `data.validation` and of each of `sets`."""

    every_steps: int
    rows: int = 0
    sets: tuple[ValidationSetSection, ...] = ()


@dataclass(frozen=True, kw_only=True)
class EvaluationSection:
    """What is measured of the model beside validation: `tasks` of the registry, each with its options."""

    tasks: tuple[TaskOptions, ...] = ()


@dataclass(frozen=True, kw_only=True)
class RewindSection:
    """How `stability.policy: rewind` works: when a spike has lasted `after` steps, the run goes back to the newest
    checkpoint at least `margin` steps before it, and skips `window` batches from the spike's first step on; at most
    `at_most` times per run.
    """

    after: int = 11
    margin: int = 100
    window: int = 200
    at_most: int = 3


@dataclass(frozen=True, kw_only=True)
class StabilitySection:
    """What to do about bad steps. A non-finite step is never applied; `max_nonfinite_steps` in a row end it (exit 5).

    The `policy` observe only measures; skip discards flagged steps, at most `max_skips` in a row; rewind goes back;
    abort ends a run that diverges. `zclip` clips norms that stand out of their own statistics. Every `probe_every`
    steps (0: only when a spike begins) attention logits and interaction matrices are measured.
    """

    policy: Literal["observe", "skip", "rewind", "abort"] = "observe"
    max_nonfinite_steps: int = 10
    max_skips: int = 10
    rewind: RewindSection = field(default_factory=RewindSection)
    zclip: bool = False
    probe_every: int = 100


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The whole configuration of a run, as returned by `compose` and stored in `<run.dir>/config.yaml`."""

    run: RunSection
    model: ModelSection
    attention: AttentionSection
    moe: MoeSection
    data: DataSection
    optim: OptimSection
    engine: EngineSection
    checkpoint: CheckpointSection
    resume: ResumeSection
    validation: ValidationSection
    evaluation: EvaluationSection = field(default_factory=EvaluationSection)
    stability: StabilitySection
    telemetry: TelemetrySection
    profile: ProfileSection
    cluster: ClusterSection

    @property
    def interactions(self) -> tuple[InteractionOptions, ...]:
        """The interaction of each layer."""
        return tuple(self.attention.interaction.at(layer) for layer in range(self.model.layers))

    @property
    def data_seed(self) -> int:
        """The seed of the sample order."""
        return self.run.seed if self.data.seed is None else self.data.seed

    @property
    def routing_seed(self) -> int:
        """The seed of the random scores of the routing warm-up."""
        return self.run.seed if self.moe.routing_seed is None else self.moe.routing_seed
