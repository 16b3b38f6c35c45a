"""Chunked cross-entropy against torch's own, in value and gradients."""

from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from kha_train.config.constants import IGNORE_LABEL
from kha_train.model.loss import chunked_cross_entropy, chunked_token_scores

V, D = 37, 8


def problem(tokens, seed, dtype=torch.float64, masked=0.3):
    generator = torch.Generator().manual_seed(seed)
    x_ND = torch.randn(tokens, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight_VD = torch.randn(V, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    labels_N = torch.randint(0, V, (tokens,), generator=generator)
    labels_N[torch.rand(tokens, generator=generator) < masked] = IGNORE_LABEL
    return x_ND, weight_VD, labels_N


def outside(x_ND, weight_VD, labels_N):
    return functional.cross_entropy(x_ND @ weight_VD.T, labels_N, reduction="sum", ignore_index=IGNORE_LABEL)


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 33), chunk=st.integers(1, 40), seed=st.integers(0, 1000), masked=st.sampled_from([0, 0.3, 1])
)
def test_value_and_gradients_equal_torch_for_any_chunk_size(tokens, chunk, seed, masked):
    x_ND, weight_VD, labels_N = problem(tokens, seed, masked=masked)
    loss = chunked_cross_entropy(x_ND, weight_VD, labels_N, chunk)
    expected = outside(x_ND, weight_VD, labels_N)
    torch.testing.assert_close(loss, expected)
    for got, want in zip(
        torch.autograd.grad(3.0 * loss, (x_ND, weight_VD)),
        torch.autograd.grad(3.0 * expected, (x_ND, weight_VD)),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


@settings(max_examples=30, deadline=None)
@given(
    tokens=st.integers(1, 33), chunk=st.integers(1, 40), seed=st.integers(0, 1000), masked=st.sampled_from([0, 0.3, 1])
)
def test_scores_of_each_token_equal_torch_for_any_chunk_size(tokens, chunk, seed, masked):
    x_ND, weight_VD, labels_N = problem(tokens, seed, masked=masked)
    logits_NV = (x_ND @ weight_VD.T).detach()
    labels_N[::3] = torch.where(labels_N[::3] == IGNORE_LABEL, IGNORE_LABEL, logits_NV[::3].argmax(1))
    scores = chunked_token_scores(x_ND, weight_VD, labels_N, chunk)
    expected = functional.cross_entropy(logits_NV, labels_N, reduction="none", ignore_index=IGNORE_LABEL)
    torch.testing.assert_close(scores.nats, expected)
    assert torch.equal(scores.hits, (logits_NV.argmax(1) == labels_N) & (labels_N != IGNORE_LABEL))
    assert not scores.nats.requires_grad


def test_bf16_weights_get_bf16_gradients_near_the_fp32_ones():
    x_ND, weight_VD, labels_N = problem(512, 0, torch.bfloat16)
    loss = chunked_cross_entropy(x_ND, weight_VD, labels_N, 1)
    wide = [t.detach().float().requires_grad_() for t in (x_ND, weight_VD)]
    expected = outside(*wide, labels_N)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=2e-3, atol=0)
    got = torch.autograd.grad(loss / 512, (x_ND, weight_VD))
    for narrow, exact in zip(got, torch.autograd.grad(expected / 512, wide), strict=True):
        assert narrow.dtype == torch.bfloat16
        assert (narrow.float() - exact).norm() < 1e-2 * exact.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("tokens, width, vocab", [(64, 128, 1000), (300, 256, 4096)])
def test_on_a_gpu_in_bf16_it_is_near_the_fp32_one(tokens, width, vocab):
    generator = torch.Generator().manual_seed(0)
    x_ND = torch.randn(tokens, width, generator=generator).cuda().to(torch.bfloat16).requires_grad_()
    weight_VD = (torch.randn(vocab, width, generator=generator) / 16).cuda().to(torch.bfloat16).requires_grad_()
    labels_N = torch.randint(0, vocab, (tokens,), generator=generator).cuda()
    wide = [t.detach().double().requires_grad_() for t in (x_ND, weight_VD)]
    loss, expected = chunked_cross_entropy(x_ND, weight_VD, labels_N, 100), outside(*wide, labels_N)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=0)
    got = torch.autograd.grad(loss / tokens, (x_ND, weight_VD))
    for narrow, exact in zip(got, torch.autograd.grad(expected / tokens, wide), strict=True):
        assert (narrow.double() - exact).norm() < 1e-2 * exact.norm()


def test_large_logits_neither_overflow_nor_lose_the_loss():
    x_ND, weight_VD, labels_N = problem(9, 1, torch.float32)
    loss = chunked_cross_entropy(x_ND * 1e4, weight_VD, labels_N, 4)
    torch.testing.assert_close(loss, outside(x_ND * 1e4, weight_VD, labels_N))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_hidden_state_shows_in_the_loss_unless_its_label_is_masked(bad):
    x_ND, weight_VD, labels_N = problem(9, 1, masked=0)
    with torch.no_grad():
        x_ND[4] = bad
    assert not chunked_cross_entropy(x_ND, weight_VD, labels_N, 4).isfinite()
    labels_N[4] = IGNORE_LABEL
    assert chunked_cross_entropy(x_ND, weight_VD, labels_N, 4).isfinite()


class SeenTensors(TorchDispatchMode):
    """Remembers the shape of everything any operation returned."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.shapes.add(tuple(out.shape))
        return out


def test_evaluation_keeps_no_gradients_and_gives_the_same_value():
    x_ND, weight_VD, labels_N = problem(20, 2)
    with torch.no_grad(), SeenTensors() as seen:
        quiet = chunked_cross_entropy(x_ND, weight_VD, labels_N, 7)
    assert (7, V) in seen.shapes and (V, D) not in seen.shapes
    assert not quiet.requires_grad and torch.equal(quiet, chunked_cross_entropy(x_ND, weight_VD, labels_N, 7).detach())


def test_full_logits_are_never_held():
    x_ND, weight_VD, labels_N = problem(640, 3, torch.float32)
    with SeenTensors() as seen:
        chunked_cross_entropy(x_ND, weight_VD, labels_N, 32).backward()
    assert max(prod(shape) for shape in seen.shapes) <= max(32 * V, 640 * D)
