"""Random small models of transformers, saved as people find them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

VOCABULARY = 256
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
HEADS = {"head_dim": 16}
SIGMOID = {
    "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1, "routed_scaling_factor": 1.7,
}  # fmt: skip
SOFTMAX = {"num_experts": 8, "num_experts_per_tok": 2}
LATENT = {
    "num_key_value_heads": 4, "kv_lora_rank": 24, "q_lora_rank": 20, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16,
    "v_head_dim": 16, "rms_norm_eps": 1e-6,
}  # fmt: skip
CLASSES: dict[str, tuple[str, dict[str, Any]]] = {
    "glm4_moe": ("Glm4Moe", {**SHAPE, **HEADS, **SIGMOID, "use_qk_norm": True}),
    "qwen3_moe": ("Qwen3Moe", {**SHAPE, **HEADS, **SOFTMAX, "moe_intermediate_size": 32}),
    "olmoe": ("Olmoe", {**SHAPE, **SOFTMAX, "intermediate_size": 32}),
    "deepseek_v3": ("DeepseekV3", {**SHAPE, **SIGMOID, **LATENT}),
    "qwen3": ("Qwen3", {**SHAPE, **HEADS}),
    "llama": ("Llama", {**SHAPE, "eos_token_id": 3, "bos_token_id": 2}),
}
"""model_type -> the name of its class in transformers, and the arguments of a small one."""

Save = Callable[..., Any]


@pytest.fixture(scope="session")
def save_model() -> Save:
    """Save a random model of a class under a directory, and return it."""
    transformers = pytest.importorskip("transformers")

    def save(kind: str, directory: Path, dtype: torch.dtype = torch.float32, shard: str = "5GB", **changes: Any) -> Any:
        name, arguments = CLASSES[kind]
        torch.manual_seed(7)
        config = getattr(transformers, f"{name}Config")(**{**arguments, **changes})
        config._attn_implementation = "eager"
        model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
        generator = torch.Generator().manual_seed(11)
        with torch.no_grad():
            # Norms and biases begin as constants, which would hide that they are mixed up.
            biases = [buffer for name, buffer in model.named_buffers() if name.endswith("correction_bias")]
            for tensor in (*model.parameters(), *biases):
                tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
        model.to(dtype).save_pretrained(directory, max_shard_size=shard)
        return model

    return save
