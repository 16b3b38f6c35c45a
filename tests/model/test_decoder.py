"""The decoder as a whole: causality, document isolation, recomputation, gradients, precision."""

from itertools import pairwise

import pytest
import torch
from torch.func import functional_call
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from kha_train.model.decoder import build_decoder

VARIANTS = ("gqa", "kha_linear", "kha_mlp", "kha_mlp_qkv")
TOKENS = torch.randint(0, 256, (2, 64), generator=torch.Generator().manual_seed(5))
LABELS = TOKENS.roll(-1, 1).masked_fill(torch.arange(64) % 7 == 6, -100)


def scrambled_decoder(config, scale=0.05):
    decoder = build_decoder(config)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return decoder


@pytest.mark.parametrize("tied", [True, False])
def test_the_loss_is_the_summed_cross_entropy_of_the_logits(tied, make_config):
    decoder = scrambled_decoder(make_config("kha_mlp", model={"tie_embeddings": tied}))
    plain, scored = decoder(TOKENS), decoder(TOKENS, LABELS)
    assert plain.loss_sum is None and scored.logits_BTV is None and torch.equal(plain.load_LE, scored.load_LE)
    assert plain.logits_BTV.dtype == torch.float32
    expected = functional.cross_entropy(plain.logits_BTV.flatten(0, 1), LABELS.flatten(), reduction="sum")
    torch.testing.assert_close(scored.loss_sum, expected)
    plain_grads = torch.autograd.grad(expected, list(decoder.parameters()))
    for got, want in zip(torch.autograd.grad(scored.loss_sum, list(decoder.parameters())), plain_grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_no_token_sees_a_later_one(variant, backend, make_config):
    decoder = scrambled_decoder(make_config(variant, attention={"backend": backend}))
    changed = TOKENS.clone()
    changed[:, 40:] = (changed[:, 40:] + 1) % 256
    first, second = decoder(TOKENS).logits_BTV, decoder(changed).logits_BTV
    torch.testing.assert_close(first[:, :40], second[:, :40])
    assert (first[:, 40] - second[:, 40]).abs().max() > 1e-3


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_documents_packed_in_rows_equal_documents_alone(variant, backend, make_config):
    decoder = scrambled_decoder(make_config(variant, attention={"backend": backend}))
    borders = [0, 5, 6, 64, 100, 128]
    positions_BT = torch.cat([torch.arange(b - a) for a, b in pairwise(borders)]).view(2, 64)
    cu_seqlens_S = torch.tensor(borders, dtype=torch.int32)
    packed = decoder(TOKENS, None, positions_BT, cu_seqlens_S, 58).logits_BTV.flatten(0, 1)
    for start, end in pairwise(borders):
        alone = decoder(TOKENS.flatten()[None, start:end]).logits_BTV[0]
        torch.testing.assert_close(packed[start:end], alone, rtol=1e-4, atol=1e-5)
    assert (decoder(TOKENS).logits_BTV.flatten(0, 1)[6:64] - packed[6:64]).abs().max() > 1e-2


def test_rows_without_inner_borders_equal_rows_without_borders_bit_for_bit(make_config):
    decoder = scrambled_decoder(make_config())
    row_starts = torch.tensor([0, 64, 128], dtype=torch.int32)
    assert torch.equal(decoder(TOKENS, None, None, row_starts, 64).logits_BTV, decoder(TOKENS).logits_BTV)


@pytest.mark.parametrize("variant", ["gqa", "kha_mlp"])
def test_recomputation_changes_neither_loads_nor_loss_nor_gradients(variant, make_config):
    results = []
    for mode in ("none", "full"):
        decoder = scrambled_decoder(make_config(variant, engine={"activation_checkpointing": mode}))
        cu_seqlens_S = torch.tensor([0, 20, 64, 128], dtype=torch.int32)
        out = decoder(TOKENS, LABELS, None, cu_seqlens_S, 64)
        out.loss_sum.backward()
        results.append([out.load_LE, out.loss_sum.detach(), *(p.grad for p in decoder.parameters())])
        assert out.load_LE.sum(1).tolist() == [256, 256] and not out.load_LE.requires_grad
    assert all(torch.equal(plain, recomputed) for plain, recomputed in zip(*results, strict=True))


def test_recomputation_keeps_less_for_the_backward(make_config):
    kept = []
    for mode in ("none", "full"):
        decoder = build_decoder(make_config(engine={"activation_checkpointing": mode}))
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: (s.append(t.numel()), t)[1], lambda t: t):
            decoder(TOKENS, LABELS)
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 2


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_has_a_finite_gradient_from_the_start(variant, make_config):
    decoder = build_decoder(make_config(variant, model={"layers": 4}))
    decoder(TOKENS, LABELS).loss_sum.backward()
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_reference_path_passes_gradcheck_in_float64(variant, make_config):
    config = make_config(
        variant,
        model={"layers": 1, "hidden_size": 16, "vocab_size": 24, "seq_len": 8, "init_std": 0.4, "loss_chunk_tokens": 5},
        moe={"experts": 4, "expert_width": 8, "backend": "loop"},
        attention={"backend": "eager"},
    )
    decoder = scrambled_decoder(config, 0.2).double()
    names, values = zip(*decoder.named_parameters(), strict=True)
    tokens = TOKENS[:, :8] % 24
    cu_seqlens_S = torch.tensor([0, 3, 8, 16], dtype=torch.int32)

    def loss(*values):
        return functional_call(
            decoder, dict(zip(names, values, strict=True)), (tokens, tokens, None, cu_seqlens_S)
        ).loss_sum

    assert torch.autograd.gradcheck(loss, values, fast_mode=True)


@pytest.mark.parametrize("qk_norm", ["per_head", "full_width", "none"])
def test_each_qk_norm_is_another_function_with_its_own_parameters(qk_norm, make_config):
    shapes = {"per_head": ((32,), (32,)), "full_width": ((128,), (64,)), "none": None}[qk_norm]
    attention = build_decoder(make_config(attention={"qk_norm": qk_norm})).blocks[0].attention
    if shapes is None:
        assert not [n for n, _ in attention.named_parameters() if "norm" in n]
        return
    assert (tuple(attention.query_norm.weight.shape), tuple(attention.key_norm.weight.shape)) == shapes
    q_BTHK = torch.randn(1, 3, 4, 32, generator=torch.Generator().manual_seed(0))
    mean = q_BTHK.square().mean(-1 if qk_norm == "per_head" else (-1, -2), keepdim=True)
    torch.testing.assert_close(attention.query_norm(q_BTHK), q_BTHK / (mean + 1e-6).sqrt())


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_mqa_and_mha_are_settings_of_the_same_base(kv_heads, make_config):
    base = make_config().attention.base
    config = make_config(
        "kha_mlp", attention={"base": type(base)(name="gqa", query_heads=4, head_dim=32, kv_heads=kv_heads)}
    )
    decoder = build_decoder(config)
    decoder(TOKENS, LABELS).loss_sum.backward()
    assert decoder.blocks[0].attention.value.weight.grad.shape == (32 * kv_heads, 64)


def test_training_in_bf16_lowers_the_loss_and_keeps_the_loss_in_fp32(make_config):
    decoder = build_decoder(make_config("kha_mlp")).to(torch.bfloat16)
    optimiser = torch.optim.SGD(decoder.parameters(), lr=1e-2)
    losses = []
    for _ in range(4):
        out = decoder(TOKENS, LABELS)
        assert out.loss_sum.dtype == torch.float32
        losses.append(out.loss_sum.item())
        optimiser.zero_grad()
        (out.loss_sum / 110).backward()
        optimiser.step()
    assert losses[-1] < losses[0] and losses[0] == pytest.approx(110 * 5.545, rel=0.05)


class NeverWait(TorchDispatchMode):
    """Refuses operations whose result shape or value the host must wait for."""

    refused = ("_local_scalar_dense", "nonzero", "bincount", "equal", "unique", "masked_select")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not any(name in func.__name__ for name in self.refused), func.__name__
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", ["none", "full"])
def test_forward_and_backward_never_wait_for_the_device(mode, make_config):
    decoder = build_decoder(make_config("kha_mlp", engine={"activation_checkpointing": mode}))
    cu_seqlens_S = torch.tensor([0, 20, 64, 128], dtype=torch.int32)
    with NeverWait():
        out = decoder(TOKENS, LABELS, None, cu_seqlens_S, 64)
        out.loss_sum.backward()
        decoder.finish_step(out.load_LE)
    looped = build_decoder(make_config(moe={"backend": "loop"}))
    with pytest.raises(AssertionError, match="nonzero"), NeverWait():
        looped(TOKENS)
