"""The attention modules against transformers' own, weights copied, in fp32, and in fp64 where theirs stays in it."""

import pytest
import torch
from torch.func import functional_call

from kha_train.config.compose import compose
from kha_train.model.attention.backends import lay_out_documents
from kha_train.model.attention.base import RowContext, build_attention
from kha_train.model.device import resolve_on
from kha_train.model.init import initial_values
from kha_train.model.rope import Rotary, rotary_table

transformers = pytest.importorskip("transformers")

B, T, D, H, K = 2, 24, 64, 4, 16
SHAPE = (
    f"model.hidden_size={D}",
    f"model.query_heads={H}",
    "model.kv_heads=2",
    f"model.head_dim={K}",
    f"model.seq_len={T}",
    "attention.backend=eager",
)


def built(*overrides, layer=0):
    """An attention with random weights, its norms' gains included."""
    config = compose([*SHAPE, *overrides])
    attention = build_attention(config, resolve_on(config, torch.device("cpu")), layer).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for owner, local, _, value in initial_values(attention, 0):
        fresh = value()
        getattr(owner, local).copy_(fresh + 0.2 * torch.randn(fresh.shape, generator=generator))
    return attention


def places(width, dtype=torch.float32):
    """Where the tokens are, for ours and for theirs."""
    cos, sin = (table.to(dtype) for table in rotary_table(T, width, 10_000.0))
    documents = lay_out_documents(B, T, torch.device("cpu"))
    rows = RowContext(Rotary(cos.expand(B, -1, -1), sin.expand(B, -1, -1)), documents)
    tables = tuple(torch.cat((table, table), dim=-1).expand(B, -1, -1) for table in (cos, sin))
    mask = torch.full((T, T), float("-inf"), dtype=dtype).triu(1)[None, None]
    return rows, {"position_embeddings": tables, "attention_mask": mask}


def states():
    """Hidden states."""
    return torch.randn(B, T, D, generator=torch.Generator().manual_seed(1))


def compare(ours, theirs, rotary_width):
    """Outputs of both on the same hidden states."""
    rows, given = places(rotary_width)
    with torch.no_grad():
        expected, *_ = theirs(states(), **given)
    assert expected.abs().mean() > 0.01
    torch.testing.assert_close(ours(states(), rows), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("preset", ["gqa", "mha", "mqa"])
def test_grouped_query_attention_is_that_of_qwen3_moe(preset):
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeAttention

    ours = built(f"attention={preset}")
    config = transformers.Qwen3MoeConfig(
        hidden_size=D,
        num_attention_heads=H,
        num_key_value_heads={"gqa": 2, "mha": 4, "mqa": 1}[preset],
        head_dim=K,
        rms_norm_eps=1e-6,
        attn_implementation="eager",
    )
    theirs = Qwen3MoeAttention(config, layer_idx=0).eval()
    names = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj"}
    names |= {"query_norm": "q_norm", "key_norm": "k_norm"}
    theirs.load_state_dict({f"{name}.weight": getattr(ours, mine).weight for mine, name in names.items()})
    compare(ours, theirs, K)


def test_the_elementwise_output_gate_is_that_of_qwen3_next():
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextAttention

    ours = built("attention=gated")
    config = transformers.Qwen3NextConfig(
        hidden_size=D,
        num_attention_heads=H,
        num_key_value_heads=2,
        head_dim=K,
        rms_norm_eps=1e-6,
        attn_implementation="eager",
    )
    theirs = Qwen3NextAttention(config, layer_idx=0).eval()
    # Each of their query heads is followed by its gate, and the gain of their norms is 1 plus the weight.
    both = torch.cat((ours.query.weight.view(H, K, D), ours.gate.weight.view(H, K, D)), dim=1).flatten(0, 1)
    names = {"key": "k_proj", "value": "v_proj", "output": "o_proj"}
    weights = {f"{name}.weight": getattr(ours, mine).weight for mine, name in names.items()}
    gains = {"q_norm.weight": ours.query_norm.weight - 1, "k_norm.weight": ours.key_norm.weight - 1}
    theirs.load_state_dict({"q_proj.weight": both, **weights, **gains})
    compare(ours, theirs, K)


def as_diff_llama(ours):
    """What `DiffLlamaAttention` holds for the same function. All its first maps come before all second ones, its norm
    has no gain, which goes into the output projection here, and the vectors of lambda have other names.
    """
    groups = ours.heads.kv_heads // 2
    queries_2GN = torch.arange(ours.heads.query_heads).view(groups, 2, -1).transpose(0, 1)
    keys_2G = torch.arange(2 * groups).view(groups, 2).T
    orders = {"query": queries_2GN, "key": keys_2G, "value": keys_2G}
    weights = {
        f"{name[0]}_proj.weight": getattr(ours, name).weight.view(-1, K, D)[order.flatten()].flatten(0, 1)
        for name, order in orders.items()
    }
    gains = ours.head_norm.weight.repeat(ours.heads.query_heads // 2)
    vectors = {"lambda_q1": "a_1", "lambda_k1": "b_1", "lambda_q2": "a_2", "lambda_k2": "b_2"}
    named = {name: getattr(ours.second, mine) for name, mine in vectors.items()}
    return {**weights, "o_proj.weight": ours.output.weight * gains, **named}


@pytest.mark.parametrize("layer", [0, 3])
@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=["fp32", "fp64"])
def test_differential_attention_is_that_of_diff_llama_forward_and_backward(dtype, near, layer):
    """Gradients of both with respect to our weights. DiffLlama has no QK-norm.

    The softmax of its eager way and its lambda are in fp32 always. So its other way computes in fp64, with vectors
    whose products cancel exactly: lambda is 1 - 1 + l0. Gradients of these vectors are compared in fp32 alone.
    """
    from transformers.models.diffllama.modeling_diffllama import DiffLlamaAttention

    wide = dtype == torch.float64
    heads = ("model.query_heads=8", "model.kv_heads=4", "attention.qk_norm=none")
    ours = built("attention=diff", *heads, layer=layer).to(dtype).requires_grad_()
    if wide:
        with torch.no_grad():
            for name, vector in ours.second.named_parameters():
                vector.copy_(torch.tensor([0.5, 0.5 if name.startswith("a") else -0.5]).repeat(K // 2))
    config = transformers.DiffLlamaConfig(
        hidden_size=D,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=K,
        rms_norm_eps=1e-5,
        attn_implementation="sdpa" if wide else "eager",
    )
    theirs = DiffLlamaAttention(config, layer_idx=layer).to(dtype)
    rows, given = places(K, dtype)
    x = states().to(dtype).requires_grad_()
    expected, *_ = functional_call(theirs, as_diff_llama(ours), (x,), given)
    weights = {name: each for name, each in ours.named_parameters() if not (wide and name.startswith("second."))}
    assert len(weights) == (5 if wide else 9)
    along = torch.linspace(-1, 1, expected.numel(), dtype=dtype).view_as(expected)
    inputs, outputs = [x, *weights.values()], (ours(x, rows), expected)
    both = [(out, *torch.autograd.grad((out * along).sum(), inputs)) for out in outputs]
    for name, got, wanted in zip(["output", "input", *weights], *both, strict=True):
        assert wanted.abs().max() > 0.01 and (got - wanted).abs().max() <= near * wanted.abs().max(), name


@pytest.mark.parametrize("query_latent", [0, 40])
def test_latent_attention_is_that_of_deepseek_v3(query_latent):
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

    latent, turned = 24, 8
    widths = (f"latent_width={latent}", f"rotary_dim={turned}", f"query_latent_width={query_latent}")
    ours = built("attention=mla", *(f"attention.base.{width}" for width in widths))
    config = transformers.DeepseekV3Config(
        hidden_size=D,
        num_attention_heads=H,
        num_key_value_heads=H,
        q_lora_rank=query_latent or None,
        kv_lora_rank=latent,
        qk_rope_head_dim=turned,
        qk_nope_head_dim=K,
        v_head_dim=K,
        rope_interleave=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        attn_implementation="eager",
    )
    theirs = DeepseekV3Attention(config, layer_idx=0).eval()

    def side_by_side(first, second):
        parts = [module.weight.unflatten(0, (H, -1)) for module in (first, second)]
        return torch.cat(parts, dim=1).flatten(0, 1)

    state = {
        "q_b_proj.weight" if query_latent else "q_proj.weight": side_by_side(ours.query, ours.rotary_query),
        "kv_a_proj_with_mqa.weight": torch.cat((ours.latent.weight, ours.rotary_key.weight)),
        "kv_a_layernorm.weight": ours.latent_norm.weight,
        "kv_b_proj.weight": side_by_side(ours.key_up, ours.value_up),
        "o_proj.weight": ours.output.weight,
    }
    if query_latent:
        state |= {"q_a_proj.weight": ours.query_down[0].weight, "q_a_layernorm.weight": ours.query_down[1].weight}
    theirs.load_state_dict(state)
    compare(ours, theirs, turned)


@pytest.mark.parametrize("heads", [1, 4, 8, 12, 20])
def test_alibi_has_the_slopes_of_bloom(heads):
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    from kha_train.model.attention.backends import alibi_slopes

    theirs = build_alibi_tensor(torch.ones(1, 2), heads, torch.float64)
    torch.testing.assert_close(torch.tensor(alibi_slopes(heads), dtype=torch.float64), theirs[:, 0, 1])
