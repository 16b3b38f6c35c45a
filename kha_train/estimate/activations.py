"""What attention saves for its backward, from the configuration alone: no torch.

Counts are numbers of the training dtype for every token, as torch's saved-tensor hooks see them on a CPU in fp32
(RMSNorm keeps its input and the normalised input; a fused kernel keeps less). A rotation keeps nothing of its own.
"""

from __future__ import annotations

from kha_train.config.resolve import backend_on, implementation, planned_device, precision_on
from kha_train.config.schema import RunConfig
from kha_train.variants.attention import FoldableOptions
from kha_train.variants.backends import TRAITS


def attention_activations(config: RunConfig, width: int) -> int:
    """Numbers of `width` bytes that the attention of one layer saves for every token, its input (counted by the block)
    left out: what its base and its interaction save, and what the kernel does."""
    base, interaction = config.attention.base, config.attention.interaction
    own = base.saved_numbers(config.attention.qk_norm)
    return own + interaction.saved_numbers(base.heads(), implementation(config)) + _kernel(config, width)


def kept_block_numbers(config: RunConfig, width: int) -> tuple[int, int]:
    """Numbers of `width` bytes that a block keeps for every token under `selective` checkpointing: one with experts (0
    if there is none), a dense one. Its input, the projections of attention that are as deep as the model is wide, what
    attention and the experts return, and the router's fp32 logits (`model/recompute.py`)."""
    model, moe, base = config.model, config.moe, config.attention.base
    heads, wide = base.heads(), model.hidden_size
    output = heads.query_heads * heads.value_width
    if heads.latent:
        query_input = base.input_widths(wide).q
        projected = base.cache_numbers() + (
            query_input if query_input < wide else heads.query_heads * (heads.key_width + base.rotary_width())
        )
    else:
        projected = base.parameters(wide) // wide - output
    attention = projected + output + 4 * heads.query_heads // width + (wide if output >= wide else 0)
    both = wide + attention
    shared = 2 * moe.shared_experts * moe.expert_width
    routed = model.hidden_size + 2 * moe.top_k * moe.expert_width + moe.experts * 4 // width
    has_experts, has_dense = moe.dense_layers < model.layers, moe.dense_layers > 0
    return (both + shared + routed if has_experts else 0), (both + 2 * moe.dense_width if has_dense else 0)


def folded_bytes(config: RunConfig, width: int) -> int:
    """Bytes of the weights that a layer makes when its interaction is folded: in fp32 and in the training dtype."""
    interaction, base = config.attention.interaction, config.attention.base
    if not isinstance(interaction, FoldableOptions) or not implementation(config).folded:
        return 0
    return (4 + width) * interaction.folded_numbers(base.heads(), base.input_widths(config.model.hidden_size))


def shared_mask_bytes(config: RunConfig) -> int:
    """Bytes for every token of the fp32 mask of ALiBi, which all layers share."""
    return 4 * config.attention.base.query_heads * config.model.seq_len if _biased(config) else 0


def _kernel(config: RunConfig, width: int) -> int:
    """What the backend saves: queries, keys, values, the output and, of every head, the logarithm of its sum."""
    base, heads, tokens = config.attention.base, config.attention.base.heads(), config.model.seq_len
    key_width = heads.key_width + (base.rotary_width() if heads.latent else 0)
    queries, output = heads.query_heads * key_width, heads.query_heads * heads.value_width
    grouped = queries + heads.kv_heads * (key_width + heads.value_width) + output
    backend, masked = _backend(config), _masked(config)
    scores = heads.query_heads * tokens
    if backend == "eager":
        # The softmax in fp32, its copy for the weighted sum, and the mask in bytes.
        held = (4 + width) * scores + (0 if _biased(config) else tokens)
        return grouped + held // width + base.saved_score_copies(width) * scores
    if backend == "sdpa" and _falls_back(config):
        return grouped + 4 * scores // width
    if backend != "sdpa" or not masked:
        return grouped + 4 * heads.query_heads // width
    # Keys and values are repeated for every query head; a bool mask becomes numbers, an fp32 one those of the dtype.
    mask = (0 if width == 4 else scores) if _biased(config) else tokens
    tied = heads.kv_heads * heads.value_width if heads.tied and config.attention.qk_norm != "none" else 0
    return 2 * queries + 2 * output + 4 * heads.query_heads // width + mask + tied


def _falls_back(config: RunConfig) -> bool:
    """Whether `sdpa` holds all scores: on a CPU for values that are not as wide as keys, and wherever values come from
    a product over heads, whose strides no kernel takes (a mask's repeated copy mends them)."""
    heads = config.attention.base.heads()
    if heads.latent and planned_device(config).kind == "cpu":
        return True
    strided = config.attention.interaction.strides_values() and not implementation(config).folded
    return strided and not _masked(config)


def _backend(config: RunConfig) -> str:
    """The backend that `attention.backend` means where the run is planned for."""
    device = planned_device(config)
    return backend_on(config, device, precision_on(config, device.kind)).name


def _biased(config: RunConfig) -> bool:
    return config.attention.positions == "alibi"


def _masked(config: RunConfig) -> bool:
    return _biased(config) or (config.data.isolate_documents and not TRAITS[_backend(config)].packed)
