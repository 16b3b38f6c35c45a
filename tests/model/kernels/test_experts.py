"""The experts' kernels against their plain twins: on a GPU, and without one in Triton's interpreter
(`TRITON_INTERPRET=1`, set before Python starts)."""

# B rows   T tokens of a row   N = B * T   D model width   F expert width   E experts   J experts per token
# M = N * J copies   X = 2F

from __future__ import annotations

from functools import partial
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kha_train.config.compose import compose
from kha_train.config.resolve import interpreted
from kha_train.model.device import resolve_on
from kha_train.model.init import initialise
from kha_train.model.kernels import movement, weighted_swiglu
from kha_train.model.kernels.launch import Call
from kha_train.model.moe.experts import grouped, loop
from kha_train.model.moe.grouped import Placement, grouped_experts, grouped_experts_backward, place
from kha_train.model.moe.layer import MoeLayer
from kha_train.model.moe.router import Routing, count_experts

pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed: it exists for Linux alone"),
    *([] if interpreted() else [pytest.mark.gpu]),
]
DEVICE = "cpu" if interpreted() else "cuda"
DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2}
"""Relative, in the Frobenius norm. The interpreter cuts numbers to bf16 where a GPU rounds them."""
E, D, F = 9, 264, 136
"""Neither width is a multiple of a tile's columns, nor below them."""
TOP_K = (1, 2, 5, 8)
KINDS = ("spread", "all to the same", "one token")
fused = partial(grouped, kernels="triton")


def route(kind: str, top_k: int) -> Tensor:
    """[N, J]: N is no multiple of a tile's rows. All to the same leaves the other experts without a token."""
    generator = torch.Generator().manual_seed(top_k)
    if kind == "all to the same":
        return torch.arange(top_k).flip(0).repeat(11, 1).to(DEVICE)
    tokens = 1 if kind == "one token" else 13
    return torch.stack([torch.randperm(E, generator=generator)[:top_k] for _ in range(tokens)]).to(DEVICE)


def laid_out(kind: str, top_k: int) -> tuple[Tensor, Placement]:
    expert_NJ = route(kind, top_k)
    return expert_NJ, place(expert_NJ, count_experts(expert_NJ, E))


def numbers(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def assert_close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert found.shape == expected.shape and found.dtype == expected.dtype
    assert (found.double() - expected.double()).norm() <= TOLERANCE[dtype] * expected.double().norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("top_k", TOP_K)
@pytest.mark.parametrize("kind", KINDS)
def test_copies_go_out_and_come_home_as_their_twins_say(kind: str, top_k: int, dtype: torch.dtype) -> None:
    expert_NJ, (order_M, home_NJ, _) = laid_out(kind, top_k)
    x_ND = numbers(expert_NJ.shape[0], D, dtype=dtype)
    copies_MD = movement.permute_triton(x_ND, order_M, home_NJ)
    assert torch.equal(copies_MD, movement.permute_torch(x_ND, order_M, home_NJ))
    y_MD = numbers(expert_NJ.numel(), D, dtype=dtype, seed=1)
    expected_ND = movement.combine_torch(y_MD.double(), home_NJ).to(dtype)
    assert_close(movement.combine_triton(y_MD, home_NJ), expected_ND, dtype)


def test_a_gradient_that_is_one_number_spread_out_is_read_as_such() -> None:
    expert_NJ, (order_M, home_NJ, _) = laid_out("spread", 2)
    grad_ND = torch.ones((), device=DEVICE).expand(expert_NJ.shape[0], D)
    assert movement.permute_triton(grad_ND, order_M, home_NJ).eq(1).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("top_k", TOP_K)
@pytest.mark.parametrize("kind", KINDS)
def test_the_activation_and_its_gradients_are_those_of_the_twin(kind: str, top_k: int, dtype: torch.dtype) -> None:
    expert_NJ, (order_M, _, _) = laid_out(kind, top_k)
    rows = expert_NJ.numel()
    gate_up_MX, grad_MF = numbers(rows, 2 * F, dtype=dtype), numbers(rows, F, dtype=dtype, seed=1)
    weight_NJ = numbers(*expert_NJ.shape, dtype=torch.float32, seed=2)
    exact = [tensor.double() for tensor in (gate_up_MX, weight_NJ, grad_MF)]
    hidden_MF = weighted_swiglu.forward_triton(gate_up_MX, weight_NJ, order_M)
    assert_close(hidden_MF, weighted_swiglu.forward_torch(*exact[:2], order_M).to(dtype), dtype)
    found = weighted_swiglu.backward_triton(gate_up_MX, weight_NJ, order_M, grad_MF)
    wanted = weighted_swiglu.backward_torch(*exact[:2], order_M, exact[2])
    for got, expected in zip(found, wanted, strict=True):
        assert_close(got, expected.to(got.dtype), dtype)
    assert found.weight_NJ.dtype == torch.float32


def problem(kind: str, top_k: int, dtype: torch.dtype) -> tuple[list[Tensor], Routing]:
    expert_NJ = route(kind, top_k)
    shapes = [(expert_NJ.shape[0], D), (E, D, 2 * F), (E, F, D)]
    leaves = [numbers(*shape, dtype=dtype, seed=seed) / shape[-1] ** 0.5 for seed, shape in enumerate(shapes)]
    leaves.append(numbers(*expert_NJ.shape, dtype=torch.float32, seed=3))
    leaves = [leaf.requires_grad_() for leaf in leaves]
    return leaves, Routing(expert_NJ, leaves[3], count_experts(expert_NJ, E))


def answers(run, kind: str, top_k: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    leaves, routing = problem(kind, top_k, dtype)
    out_ND = run(*leaves[:3], routing)
    return (out_ND, *torch.autograd.grad(out_ND, leaves, numbers(*out_ND.shape, dtype=dtype, seed=5)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("top_k", TOP_K)
@pytest.mark.parametrize("kind", KINDS)
def test_experts_by_kernels_equal_the_loop_and_their_gradients_too(kind: str, top_k: int, dtype: torch.dtype) -> None:
    if DEVICE == "cuda" and dtype == torch.float32:
        pytest.skip("torch's grouped product on CUDA is for bf16")
    for found, expected in zip(answers(fused, kind, top_k, dtype), answers(loop, kind, top_k, dtype), strict=True):
        assert_close(found, expected, dtype)


@pytest.mark.parametrize(("kernels", "starts"), [("auto", 0), ("torch", 0), ("triton", 7)])
def test_a_layer_starts_them_when_they_are_asked_for(kernels: str, starts: int, monkeypatch) -> None:
    """Out, activation, home; then the gradient out, the activation's, tokens out again, and the gradient home."""
    config = compose(["model=tiny", "model.hidden_size=32", "model.head_dim=8", f"engine.kernels={kernels}"])
    layer = MoeLayer(config, resolve_on(config, torch.device(DEVICE)), 0)
    started, start = [], Call.start
    initialise(layer, seed=1)
    monkeypatch.setattr(Call, "start", lambda call: (started.append(call), start(call)))
    x_BTD = numbers(2, 5, 32, dtype=torch.bfloat16).requires_grad_()
    y_BTD, _ = layer.to(DEVICE, torch.bfloat16)(x_BTD, torch.arange(2, device=DEVICE))
    y_BTD.sum().backward()
    assert len(started) == starts and x_BTD.grad.isfinite().all()


def test_twice_and_under_a_checkpoint_the_bits_are_the_same() -> None:
    recomputed = partial(checkpoint, fused, use_reentrant=False)
    first, *others = (answers(run, "spread", 5, torch.bfloat16) for run in (fused, fused, recomputed))
    for other in others:
        assert all(torch.equal(expected, found) for expected, found in zip(first, other, strict=True))


def test_it_compiles_into_one_graph_with_the_same_numbers() -> None:
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    pairs = zip(
        answers(fused, "spread", 2, torch.bfloat16), answers(compiled, "spread", 2, torch.bfloat16), strict=True
    )
    assert all(torch.equal(expected, found) for expected, found in pairs)


def test_torch_admits_the_operators_with_these_kernels() -> None:
    leaves, routing = problem("spread", 2, torch.bfloat16)
    placement = place(routing.expert_NJ, routing.load_E)
    torch.library.opcheck(grouped_experts, (*leaves, *placement, "triton"))
    plain = [leaf.detach() for leaf in leaves]
    first_MX = numbers(routing.expert_NJ.numel(), 2 * F, dtype=torch.bfloat16)
    torch.library.opcheck(grouped_experts_backward, (plain[0], *plain, *placement, first_MX, "triton"))
