"""What attention saves for its backward, from the configuration alone: no torch.

Counts are numbers of the training dtype per token, as torch's saved-tensor hooks see them on a CPU in fp32, where
RMSNorm keeps its input and the normalised input. On CUDA it is one kernel that keeps its input alone. A rotation saves
nothing itself.
"""

from __future__ import annotations

from kha_train.config.resolve import decide_plan, planned_device
from kha_train.config.schema import RunConfig
from kha_train.estimate.counts import attention_parameters, moe_layers
from kha_train.variants.attention import POSITIONS, FoldableOptions, shared_key_repeats
from kha_train.variants.backends import TRAITS


def block_activations(config: RunConfig) -> tuple[int, int]:
    """Numbers per token that a block saves for its backward: a block with experts (0 if there is none), and a dense
    one.

    Attention: its input before and after the norm, and what `attention_activations` counts. Experts: their input before
    and after the norm; in bf16 its fp32 copy for the router; for each of top_k gate and up, which is all that the
    grouped backend keeps. The other backends also keep the copied input and 3 more tensors of the expert's width (silu
    of gate, its product with up, and that times the weight); shared experts and dense layers the first two of them.
    Where ranks share the experts, the rows that arrived stay too: as many as were sent, when loads are balanced.
    """
    model, moe, narrow = config.model, config.moe, decide_plan(config).precision == "bf16"
    attention = 2 * model.hidden_size + attention_activations(config, 2 if narrow else 4)
    shared = 4 * moe.shared_experts * moe.expert_width
    copy = 2 * moe.expert_width if moe.backend == "grouped" else model.hidden_size + 5 * moe.expert_width
    arrived = model.hidden_size if config.engine.expert_parallel > 1 else 0
    widened = 2 * model.hidden_size if narrow and moe.router_precision == "fp32" else 0
    routed = moe.top_k * (copy + arrived) + 2 * moe.experts + widened
    experts = attention + 2 * model.hidden_size + routed + shared
    dense = attention + 2 * model.hidden_size + 4 * moe.dense_width
    return (experts if moe_layers(config) else 0), (dense if moe.dense_layers else 0)


def attention_activations(config: RunConfig, width: int) -> int:
    """Numbers of `width` bytes per token that the attention of one layer saves, without its input (which the block
    counts): those of its base, its interaction and the kernel. Where layers differ, of the one that saves most.
    """
    base, way = config.attention.base, decide_plan(config).interaction
    norm, heads = config.attention.qk_norm, base.heads()
    fused = planned_device(config).kind == "cuda"
    own = base.saved_numbers(norm) - fused * base.normalised_numbers(norm) + base.gate_numbers()
    exchanged = max(
        one.saved_numbers(heads, way) - fused * one.normalised_numbers(heads) for one in {*config.interactions}
    )
    return own + exchanged + _kernel(config, width)


def kept_block_numbers(config: RunConfig, width: int) -> tuple[int, int]:
    """Numbers of `width` bytes per token that a block keeps under `selective` checkpointing: for a block with experts
    (0 if there is none), and for a dense one. These are its input, the projections of attention that are as deep as the
    model is wide, the results of attention and of experts that no ranks share, and the router's fp32 logits
    (`model/recompute.py`).
    """
    model, moe, base = config.model, config.moe, config.attention.base
    heads, wide = base.heads(), model.hidden_size
    output = heads.query_heads * heads.value_width
    if heads.latent:
        query_input = base.input_widths(wide).q
        queries = heads.query_heads * base.kernel_width()
        projected = base.cache_numbers() + base.gate_outputs() + (query_input if query_input < wide else queries)
    else:
        projected = max(attention_parameters(config)) // wide - output
    results = base.kernel_calls * (output + 4 * heads.query_heads // width)
    attention = projected + results + (wide if output >= wide else 0)
    both = wide + attention
    shared = 2 * moe.shared_experts * moe.expert_width
    computed = model.hidden_size + 2 * moe.top_k * moe.expert_width if config.engine.expert_parallel == 1 else 0
    routed = computed + moe.experts * 4 // width
    has_experts, has_dense = moe.dense_layers < model.layers, moe.dense_layers > 0
    return (both + shared + routed if has_experts else 0), (both + 2 * moe.dense_width if has_dense else 0)


def folded_bytes(config: RunConfig, width: int) -> int:
    """Bytes of the folded weights that a layer makes: in fp32 and in the training dtype. Where layers differ, of the
    one that makes most.
    """
    base = config.attention.base
    if not decide_plan(config).interaction.folded:
        return 0
    heads, inputs = base.heads(), base.input_widths(config.model.hidden_size)
    folded = [one for one in {*config.interactions} if isinstance(one, FoldableOptions)]
    return (4 + width) * max((one.folded_numbers(heads, inputs) for one in folded), default=0)


def shared_mask_bytes(config: RunConfig) -> int:
    """Bytes per token of the fp32 mask of biased scores, which all layers share; rows that are one document each share
    one mask."""
    numbers = config.attention.base.query_heads * config.model.seq_len // _rows_of_a_mask(config)
    return 4 * numbers if _biased(config) else 0


def _rows_of_a_mask(config: RunConfig) -> int:
    return 1 if config.data.isolate_documents else config.engine.micro_batch_size


def _kernel(config: RunConfig, width: int) -> int:
    """What the backend saves: queries, keys, values, the output and, for every head, the logarithm of its sum. Several
    calls share queries and keys, unless a mask repeats keys.
    """
    base, heads, tokens = config.attention.base, config.attention.base.heads(), config.model.seq_len
    own = base.own_kernel_numbers(_backend(config), tokens, config.data.isolate_documents, width)
    if own is not None:
        return own
    queries = heads.query_heads * base.kernel_width()
    repeated = _backend(config) == "sdpa" and _masked(config) and not _falls_back(config)
    shared = queries + (0 if repeated else heads.kv_heads * heads.key_width)
    return base.kernel_calls * _one_call(config, width) - (base.kernel_calls - 1) * shared


def _one_call(config: RunConfig, width: int) -> int:
    base, heads, tokens = config.attention.base, config.attention.base.heads(), config.model.seq_len
    ranks = config.engine.context_parallel
    keys = heads.kv_heads * shared_key_repeats(heads.query_heads, heads.kv_heads, ranks)
    key_width = base.kernel_width()
    queries, output = heads.query_heads * key_width, heads.query_heads * heads.value_width
    grouped = queries + keys * (key_width + heads.value_width) + output
    backend, masked = _backend(config), _masked(config)
    # Ranks that share rows hold a share of the heads and whole masks.
    scores = heads.query_heads * tokens
    # The kernel keeps its output, and what reads it the copy that arrived; several calls are combined before they are
    # sent.
    arrived = output if ranks > 1 and base.kernel_calls == 1 else 0
    if backend == "eager":
        # The softmax in fp32, its copy for the weighted sum, and the mask in bytes.
        held = (4 + width) * scores + (0 if _biased(config) else tokens * ranks)
        return grouped + held // width + base.saved_score_copies(width) * scores
    if backend == "sdpa" and _falls_back(config):
        return grouped + 4 * scores // width
    if backend != "sdpa" or not masked:
        # Kernels of variable length take one width: narrower values are padded, and the output is cut and copied.
        narrower = max(key_width - heads.value_width, 0) if TRAITS[backend].packed else 0
        padded = (heads.query_heads + heads.kv_heads) * narrower + (output if narrower else arrived)
        return grouped + padded + 4 * heads.query_heads // width
    # Keys and values are repeated for every query head; a bool mask becomes numbers, an fp32 mask is converted to the
    # dtype.
    mask = (0 if width == 4 else scores // _rows_of_a_mask(config)) if _biased(config) else tokens * ranks
    tied = heads.kv_heads * heads.value_width if heads.tied and config.attention.qk_norm != "none" else 0
    return 2 * queries + 2 * output + arrived + 4 * heads.query_heads // width + mask + tied


def _falls_back(config: RunConfig) -> bool:
    """Whether `sdpa` holds all scores: on a CPU if values and keys differ in width, and wherever values come from a
    product over heads, whose strides no kernel supports (a mask's repeated copy avoids that).
    """
    heads = config.attention.base.heads()
    if heads.latent and planned_device(config).kind == "cpu":
        return True
    strides = any(one.strides_values() for one in {*config.interactions})
    strided = strides and not decide_plan(config).interaction.folded
    # Values that are arranged for several calls are copies.
    return strided and not _masked(config) and config.attention.base.kernel_calls == 1


def _backend(config: RunConfig) -> str:
    """The backend behind `attention.backend` on the planned device."""
    return decide_plan(config).backend.name


def _biased(config: RunConfig) -> bool:
    return POSITIONS[config.attention.positions].bias


def _masked(config: RunConfig) -> bool:
    return _biased(config) or (config.data.isolate_documents and not TRAITS[_backend(config)].packed)
