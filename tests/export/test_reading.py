"""`config.json` of published models is read as what they are, in old spellings and new ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from kha_train.config.schema import RunConfig
from kha_train.errors import ConfigError
from kha_train.estimate.counts import count_parameters
from kha_train.export.directory import ModelDirectory, StoredTensor
from kha_train.export.reading import Described, configure, describe

COMMON = {
    "attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu", "initializer_range": 0.02,
    "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": True, "bos_token_id": 1,
    "eos_token_id": 2, "rope_scaling": None,
}  # fmt: skip
PUBLISHED: dict[str, dict[str, Any]] = {
    "OLMoE-1B-7B-0924": {
        **COMMON, "architectures": ["OlmoeForCausalLM"], "model_type": "olmoe", "clip_qkv": None, "hidden_size": 2048,
        "intermediate_size": 1024, "max_position_embeddings": 4096, "norm_topk_prob": False, "num_attention_heads": 16,
        "num_experts": 64, "num_experts_per_tok": 8, "num_hidden_layers": 16, "num_key_value_heads": 16,
        "output_router_logits": False, "pad_token_id": 1, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "router_aux_loss_coef": 0.01, "tie_word_embeddings": False, "vocab_size": 50304,
    },
    "Qwen3-30B-A3B": {
        **COMMON, "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "decoder_sparse_step": 1,
        "head_dim": 128, "hidden_size": 2048, "intermediate_size": 6144, "max_position_embeddings": 40960,
        "max_window_layers": 48, "mlp_only_layers": [], "moe_intermediate_size": 768, "norm_topk_prob": True,
        "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48,
        "num_key_value_heads": 4, "output_router_logits": False, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.001, "sliding_window": None, "tie_word_embeddings": False,
        "use_sliding_window": False, "vocab_size": 151936,
    },
    "Qwen3-0.6B": {
        **COMMON, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 128, "hidden_size": 1024,
        "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28,
        "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-6,
        "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True, "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "Llama-2-7b": {
        **COMMON, "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096,
        "intermediate_size": 11008, "max_position_embeddings": 4096, "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 32, "pretraining_tp": 1, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False, "vocab_size": 32000,
    },
}  # fmt: skip
PARAMETERS = {
    "OLMoE-1B-7B-0924": 6_919_161_856,
    "Qwen3-30B-A3B": 30_532_122_624,
    "Qwen3-0.6B": 596_049_920,
    "Llama-2-7b": 6_738_415_616,
}
"""As published."""


def read(values: Mapping[str, Any]) -> Described:
    """What a `config.json` of these `values` describes, whatever its weights are."""
    tensors = {f"tensor {number}": StoredTensor(Path("none"), "F32", ()) for number in range(10_000)}
    return describe(ModelDirectory(Path("stock"), dict(values), tensors, ()), {})


def configured(values: Mapping[str, Any]) -> RunConfig:
    return configure(read(values), [])


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_has_the_published_number_of_parameters(name: str) -> None:
    assert count_parameters(configured(PUBLISHED[name])).total == PARAMETERS[name]


def test_older_and_newer_releases_write_the_same_positions_differently() -> None:
    old = PUBLISHED["Qwen3-0.6B"]
    plain = {key: value for key, value in old.items() if key not in ("rope_theta", "rope_scaling")}
    new = {**plain, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    assert read(new) == read(old)
    assert configured(new).model.rope_theta == 1e6
    assert configured(plain).model.rope_theta == 1e4


YARN = {"factor": 4.0, "original_max_position_embeddings": 32768}


def test_stretched_positions_are_read_in_both_spellings() -> None:
    old = PUBLISHED["Qwen3-0.6B"] | {"rope_scaling": {"type": "yarn", **YARN}}
    new = PUBLISHED["Qwen3-0.6B"] | {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, **YARN}}
    assert read(new) == read(old)
    model = configured(new).model
    assert (model.rope_scaling, model.rope_factor, model.rope_original_seq_len) == ("yarn", 4.0, 32768)
    assert (model.rope_beta_fast, model.rope_beta_slow, model.rope_attention_factor) == (32.0, 1.0, None)
    halves = {"rope_scaling": {"type": "linear", "factor": 2}}
    assert configured(PUBLISHED["Llama-2-7b"] | halves).model.rope_scaling == "linear"


@pytest.mark.slow
def test_experts_without_a_bias_are_balanced_by_the_loss_of_their_class() -> None:
    moe = configured(PUBLISHED["OLMoE-1B-7B-0924"]).moe
    assert moe.bias_update_rate == 0 and moe.auxiliary_loss.weight == pytest.approx(0.01 / 16)
    assert configured(PUBLISHED["Qwen3-0.6B"]).moe.auxiliary_loss.weight == 0


@pytest.mark.parametrize(
    ("name", "changes", "told"),
    [
        ("OLMoE-1B-7B-0924", {"clip_qkv": 8.0}, "clip_qkv = 8.0"),
        ("OLMoE-1B-7B-0924", {"sliding_window": 512}, "sliding_window = 512"),
        ("Qwen3-30B-A3B", {"decoder_sparse_step": 2}, "decoder_sparse_step = 2"),
        ("Qwen3-30B-A3B", {"mlp_only_layers": [47]}, "mlp_only_layers"),
        ("Qwen3-30B-A3B", {"shared_expert_intermediate_size": 768}, "shared_expert_intermediate_size = 768"),
        ("Llama-2-7b", {"mlp_bias": True}, "mlp_bias = True"),
        ("Llama-2-7b", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling"),
        ("Llama-2-7b", {"rope_scaling": {"type": "yarn", **YARN, "truncate": False}}, "truncate = False"),
        ("Llama-2-7b", {"rope_scaling": {"type": "yarn", **YARN, "attn_factor": 2.0}}, "attn_factor = 2.0"),
        ("Llama-2-7b", {"rope_scaling": {"type": "linear", "factor": 2.0, "beta_fast": 3.0}}, "beta_fast = 3.0"),
        ("Llama-2-7b", {"rope_scaling": {"type": "linear"}}, "factor: missing"),
        (
            "Llama-2-7b",
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}},
            "says otherwise than rope_parameters",
        ),
        ("Llama-2-7b", {"rope_interleaved": True}, "rope_interleaved = True"),
        ("Llama-2-7b", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ("Llama-2-7b", {"model_type": "mistral"}, "model_type = 'mistral'"),
    ],
)
def test_an_option_that_our_decoder_lacks_is_refused_by_name_and_value(
    name: str, changes: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        read(PUBLISHED[name] | changes)
    assert told in str(raised.value) and raised.value.exit_code == 2
