"""Backends agree: `eager` with a loop over heads and tokens, every other one with `eager`."""

import pytest
import torch
from torch.torch_version import TorchVersion

from kha_train.model.attention import backends
from kha_train.model.attention.backends import BACKENDS, eager, grouped_words, lay_out_documents
from kha_train.variants.backends import TRAITS

BORDERS = {"whole rows": None, "split rows": [0, 3, 12, 17, 23, 24], "only row starts": [0, 12, 24]}


def inputs(dtype, kv_heads=2):
    generator = torch.Generator().manual_seed(3)
    shapes = [(2, 12, 4, 8), (2, 12, kv_heads, 8), (2, 12, kv_heads, 8)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def documents(borders):
    cu_seqlens_S = None if borders is None else torch.tensor(borders, dtype=torch.int32)
    return lay_out_documents(2, 12, torch.device("cpu"), cu_seqlens_S, 12)


def one_token_at_a_time(q, k, v, borders):
    borders = borders or [0, 12, 24]
    out = torch.zeros_like(q)
    for row in range(2):
        for token in range(12):
            start = max(border for border in borders if border <= row * 12 + token) - row * 12
            for head in range(4):
                group = head // (4 // k.shape[2])
                scores = k[row, start : token + 1, group] @ q[row, token, head] / 8**0.5
                out[row, token, head] = scores.softmax(0) @ v[row, start : token + 1, group]
    return out


@pytest.mark.parametrize("borders", BORDERS.values(), ids=BORDERS.keys())
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_eager_is_the_formula_one_head_and_token_at_a_time(kv_heads, borders):
    q, k, v = (t.detach() for t in inputs(torch.float64, kv_heads))
    torch.testing.assert_close(eager(q, k, v, documents(borders), 8**-0.5), one_token_at_a_time(q, k, v, borders))


@pytest.mark.parametrize("borders", BORDERS.values(), ids=BORDERS.keys())
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(
    "name",
    sorted(name for name, one in TRAITS.items() if not one.cuda and name != "eager" and "softmax" in one.serves),
)
def test_every_backend_of_softmax_equals_eager_forward_and_backward(name, kv_heads, borders):
    results = []
    for backend in (eager, BACKENDS[name]):
        qkv = inputs(torch.float32, kv_heads)
        out = backend(*qkv, documents(borders), 8**-0.5)
        weights = torch.linspace(-1, 1, out.numel()).view_as(out)
        results.append((out.detach(), *torch.autograd.grad((out * weights).sum(), qkv)))
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_no_mask_is_made_when_no_document_ends_inside_a_row():
    assert documents(BORDERS["only row starts"]).mask_BJTU is None
    assert documents(None).mask_BJTU is None
    assert documents(BORDERS["split rows"]).mask_BJTU.shape == (2, 1, 12, 12)
    assert documents(None).cu_seqlens_S.tolist() == [0, 12, 24]
    borders_S = torch.tensor(BORDERS["split rows"], dtype=torch.int32)
    assert lay_out_documents(2, 12, borders_S.device, borders_S, 12, masked=False).mask_BJTU is None


def as_in_torch_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size):
    """The signature of torch 2.11's kernel of variable length, computed by the formula. The kernel refuses heads whose
    numbers do not lie side by side.
    """
    assert {x.stride(-1) for x in (query, key, value)} == {1}
    assert (cu_seq_q is cu_seq_k, max_q, max_k, return_aux, window_size) == (True, 12, 12, None, (-1, 0))
    rows = lay_out_documents(1, query.shape[0], query.device, cu_seq_q, max_q)
    return eager(query[None], key[None], value[None], rows, scale)[0]


def as_in_torch_2_12(*inputs, return_aux=None, scale=None, window_size=(-1, -1), enable_gqa=False, seqused_k=None):
    """That of later releases, which take fewer key/value heads only when told to."""
    assert enable_gqa == (inputs[0].shape[1] != inputs[1].shape[1])
    return as_in_torch_2_11(*inputs, return_aux=return_aux, scale=scale, window_size=window_size)


@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize(("release", "kernel"), [("2.11.0+cu128", as_in_torch_2_11), ("2.12.0", as_in_torch_2_12)])
def test_varlen_calls_the_kernel_of_every_admitted_torch(monkeypatch, release, kernel, kv_heads):
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    monkeypatch.setattr(backends, "GROUPED_WORDS", grouped_words(TorchVersion(release)))
    q, k, v = inputs(torch.float64, kv_heads)
    for borders in BORDERS.values():
        expected = eager(q, k, v, documents(borders), 8**-0.5)
        # As a composition of heads leaves them.
        strided = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v)]
        for given in ([q, k, v], strided):
            torch.testing.assert_close(backends.varlen(*given, documents(borders), 8**-0.5), expected)
