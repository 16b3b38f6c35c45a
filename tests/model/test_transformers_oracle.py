"""The decoder against transformers' Glm4Moe, which has the same router, QK-norm and experts."""

import re

import pytest
import torch

from kha_train.heads import insert
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


def copy_weights(decoder, model, absorb=True):
    state = {"model.embed_tokens.weight": decoder.embedding.weight, "model.norm.weight": decoder.norm.weight}
    state["lm_head.weight"] = decoder.head.weight
    for i, block in enumerate(decoder.blocks):
        attention, experts, router = block.attention, block.feed_forward.experts, block.feed_forward.router
        mixers = dict(getattr(attention.interaction, "maps", {})) if absorb else {}
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
    decoder, model = moved(build_decoder(config)), host(config.model, config.moe)
    with torch.no_grad():
        copy_weights(decoder, model)
        torch.testing.assert_close(decoder(TOKENS).logits_BTV, model(TOKENS).logits, rtol=1e-5, atol=1e-5)


INSERTED = {
    "kha_linear": ("kha_linear", {}),
    "linear_a_head": ("kha_linear", {"share": "none"}),
    "kha_mlp": ("kha_mlp", {}),
    "mlp_a_head": ("kha_mlp", {"projections": ("q", "k", "v"), "share": "none"}),
    "kha_gate": ("kha_gate", {}),
    "mea": ("mea", {}),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("variant", INSERTED)
def test_heads_inserted_into_glm4_moe_compute_what_the_decoder_does(variant, make_config):
    """Logits, and the gradients of what heads exchange information through and of the projections before it."""
    interaction, options = INSERTED[variant]
    config = make_config(variant)
    decoder, model = moved(build_decoder(config)), host(config.model, config.moe)
    copy_weights(decoder, model, absorb=False)
    insert(model, interaction, **options)
    ours = {heads_name(name): value for name, value in decoder.named_parameters() if ".interaction." in name}
    theirs = {name: value for name, value in model.named_parameters() if ".kha." in name}
    assert ours.keys() == theirs.keys()
    model.load_state_dict(ours, strict=False)
    for projection in ("query", "key", "value"):
        name = f"model.layers.0.self_attn.{projection[0]}_proj.weight"
        ours[name], theirs[name] = (
            decoder.get_parameter(f"blocks.0.attention.{projection}.weight"),
            model.get_parameter(name),
        )
    found, expected = model(TOKENS).logits, decoder(TOKENS).logits_BTV
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3))
    gradients = torch.autograd.grad((expected * weights).sum(), list(ours.values()))
    for value, (name, gradient) in zip(
        torch.autograd.grad((found * weights).sum(), [theirs[name] for name in ours]),
        zip(ours, gradients, strict=True),
        strict=True,
    ):
        assert gradient.norm() > 0 and (value - gradient).norm() < 1e-5 * gradient.norm(), name


def heads_name(name):
    """Where `kha_train.heads` has a parameter of the decoder."""
    name = re.sub(r"^blocks\.(\d+)\.attention\.interaction\.", r"model.layers.\1.self_attn.kha.", name)
    name = re.sub(r"\.maps\.(\w)\.weight$", r".\1.map", name)
    name = re.sub(r"\.maps\.(\w\.\w+)\.weight$", r".\1", name)
    name = re.sub(r"\.compose\.(\w)\.weight$", r".\1.across", name)
    return name.replace(".norm.weight", ".output.gain")


def moved(decoder):
    """The decoder with weights as after training, in place."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        for block in decoder.blocks:
            block.feed_forward.router.selection_bias.normal_(0, 0.05, generator=generator)
    return decoder
