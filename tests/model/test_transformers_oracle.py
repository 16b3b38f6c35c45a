"""The decoder against transformers' Glm4Moe, which has the same router, QK-norm and experts."""

import pytest
import torch

from kha_train.model.decoder import build_decoder

transformers = pytest.importorskip("transformers")

TOKENS = torch.randint(0, 256, (2, 64), generator=torch.Generator().manual_seed(5))


def host(model, moe):
    """A Glm4Moe of the same shape. Its defaults differ: rotated part, norms, shared expert, scaling."""
    config = transformers.Glm4MoeConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        num_hidden_layers=model.layers,
        num_attention_heads=model.query_heads,
        num_key_value_heads=model.kv_heads,
        head_dim=model.head_dim,
        use_qk_norm=True,
        rms_norm_eps=model.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta, "partial_rotary_factor": 1.0},
        n_routed_experts=moe.experts,
        num_experts_per_tok=moe.top_k,
        moe_intermediate_size=moe.expert_width,
        routed_scaling_factor=moe.routed_scaling,
        norm_topk_prob=True,
        n_shared_experts=0,
        first_k_dense_replace=0,
        n_group=1,
        topk_group=1,
        tie_word_embeddings=model.tie_embeddings,
        attn_implementation="eager",
    )
    return transformers.Glm4MoeForCausalLM(config).eval()


def absorbed(projection, mixer):
    """The projection weight with the shared matrix multiplied into every head; unchanged without one."""
    if mixer is None:
        return projection.weight
    weight_HKD = projection.weight.view(-1, mixer.weight.shape[0], projection.weight.shape[1])
    return torch.einsum("hkd,ke->hed", weight_HKD, mixer.weight).flatten(0, 1)


def copy_weights(decoder, model):
    state = {"model.embed_tokens.weight": decoder.embedding.weight, "model.norm.weight": decoder.norm.weight}
    state["lm_head.weight"] = decoder.head.weight
    for i, block in enumerate(decoder.blocks):
        attention, experts, router = block.attention, block.feed_forward.experts, block.feed_forward.router
        mixers = dict(getattr(attention.interaction, "maps", {}))
        state |= {
            f"model.layers.{i}.{name}": value
            for name, value in {
                "input_layernorm.weight": block.attention_norm.weight,
                "post_attention_layernorm.weight": block.feed_forward_norm.weight,
                "self_attn.q_proj.weight": absorbed(attention.query, mixers.get("q")),
                "self_attn.k_proj.weight": absorbed(attention.key, mixers.get("k")),
                "self_attn.v_proj.weight": absorbed(attention.value, mixers.get("v")),
                "self_attn.o_proj.weight": attention.output.weight,
                "self_attn.q_norm.weight": attention.query_norm.weight,
                "self_attn.k_norm.weight": attention.key_norm.weight,
                "mlp.gate.weight": router.weight,
                "mlp.gate.e_score_correction_bias": router.selection_bias,
                "mlp.experts.gate_up_proj": experts.gate_up.transpose(1, 2),
                "mlp.experts.down_proj": experts.down.transpose(1, 2),
            }.items()
        }
    missing = model.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys and all(".shared_experts." in name for name in missing.missing_keys)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("variant", ["gqa", "kha_linear"])
def test_logits_equal_glm4_moe_with_the_same_weights(variant, tied, make_config):
    config = make_config(variant, model={"layers": 3, "tie_embeddings": tied})
    decoder = build_decoder(config)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        for block in decoder.blocks:
            block.feed_forward.router.selection_bias.normal_(0, 0.05, generator=generator)
        model = host(config.model, config.moe)
        copy_weights(decoder, model)
        torch.testing.assert_close(decoder(TOKENS).logits_BTV, model(TOKENS).logits, rtol=1e-5, atol=1e-5)
