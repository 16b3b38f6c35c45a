"""The routing of published models against transformers: the same weights give the same logits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kha_train.model.decoder import build_decoder

transformers = pytest.importorskip("transformers")

TOKENS = torch.randint(0, 256, (2, 64), generator=torch.Generator().manual_seed(5))
SOFTMAX = {"score": "softmax", "routed_scaling": 1.0}


def perturbed(config):
    decoder, generator = build_decoder(config), torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return decoder


def split_gate_up(swiglu):
    gate, up = swiglu.gate_up.weight.chunk(2)
    return {"gate_proj.weight": gate, "up_proj.weight": up, "down_proj.weight": swiglu.down.weight}


def state_of(decoder):
    """The decoder's weights under the names that transformers' mixtures share."""
    state = {"model.embed_tokens.weight": decoder.embedding.weight, "model.norm.weight": decoder.norm.weight}
    state["lm_head.weight"] = decoder.head.weight
    for i, block in enumerate(decoder.blocks):
        attention, ffn = block.attention, block.feed_forward
        names = {
            "input_layernorm.weight": block.attention_norm.weight,
            "post_attention_layernorm.weight": block.feed_forward_norm.weight,
            "self_attn.q_proj.weight": attention.query.weight,
            "self_attn.k_proj.weight": attention.key.weight,
            "self_attn.v_proj.weight": attention.value.weight,
            "self_attn.o_proj.weight": attention.output.weight,
            "self_attn.q_norm.weight": attention.query_norm.weight,
            "self_attn.k_norm.weight": attention.key_norm.weight,
        }
        if block.has_experts:
            names |= {
                "mlp.gate.weight": ffn.router.weight,
                "mlp.gate.e_score_correction_bias": ffn.router.selection_bias,
                "mlp.experts.gate_up_proj": ffn.experts.gate_up.transpose(1, 2),
                "mlp.experts.down_proj": ffn.experts.down.transpose(1, 2),
            }
            if ffn.shared is not None:
                names |= {f"mlp.shared_experts.{name}": value for name, value in split_gate_up(ffn.shared).items()}
        else:
            names |= {f"mlp.{name}": value for name, value in split_gate_up(ffn).items()}
        state |= {f"model.layers.{i}.{name}": value for name, value in names.items()}
    return state


def assert_same_logits(decoder, model, *, bias):
    state = state_of(decoder)
    if not bias:
        state = {name: value for name, value in state.items() if not name.endswith("correction_bias")}
    loaded = model.eval().load_state_dict(state, strict=False)
    assert not loaded.unexpected_keys and not loaded.missing_keys
    with torch.no_grad():
        torch.testing.assert_close(decoder(TOKENS).logits_BTV, model(TOKENS).logits, rtol=1e-5, atol=1e-5)


def test_ling_s_groups_shared_expert_dense_layer_and_partial_rotation_are_those_of_glm4_moe(make_config):
    moe = {
        "experts": 16,
        "top_k": 4,
        "shared_experts": 1,
        "dense_layers": 1,
        "dense_width": 96,
        "expert_groups": 4,
        "top_groups": 2,
    }
    config = make_config(moe=moe, model={"layers": 3, "partial_rotary_factor": 0.5, "tie_embeddings": False})
    decoder = perturbed(config)
    for router in decoder.routers():
        router.selection_bias.normal_(0, 0.05, generator=torch.Generator().manual_seed(2))
    model = transformers.Glm4MoeForCausalLM(
        transformers.Glm4MoeConfig(
            **common(config.model),
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5},
            use_qk_norm=True,
            n_routed_experts=16,
            num_experts_per_tok=4,
            moe_intermediate_size=128,
            intermediate_size=96,
            n_shared_experts=1,
            first_k_dense_replace=1,
            n_group=4,
            topk_group=2,
            routed_scaling_factor=2.5,
            norm_topk_prob=True,
        )
    )
    assert_same_logits(decoder, model, bias=True)


def test_softmax_routing_with_renormalised_weights_is_that_of_qwen3(make_config):
    config = make_config(moe=SOFTMAX, model={"layers": 2, "tie_embeddings": False})
    model = transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(
            **common(config.model),
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
            num_experts=8,
            num_experts_per_tok=2,
            moe_intermediate_size=128,
            norm_topk_prob=True,
            decoder_sparse_step=1,
            mlp_only_layers=[],
        )
    )
    assert_same_logits(perturbed(config), model, bias=False)


def test_softmax_scores_as_they_are_with_full_width_norms_are_those_of_olmoe(make_config):
    config = make_config(
        moe={**SOFTMAX, "renormalize": False},
        attention={"qk_norm": "full_width"},
        model={"layers": 2, "head_dim": 16, "tie_embeddings": False},
    )
    attention = replace(config.attention, base=replace(config.attention.base, head_dim=16))
    config = replace(config, attention=attention)
    shape = {name: value for name, value in common(config.model).items() if name != "head_dim"}
    model = transformers.OlmoeForCausalLM(
        transformers.OlmoeConfig(
            **shape,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
            num_experts=8,
            num_experts_per_tok=2,
            intermediate_size=128,
            norm_topk_prob=False,
        )
    )
    assert_same_logits(perturbed(config), model, bias=False)


def common(model):
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.query_heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": False,
        "attn_implementation": "eager",
    }
