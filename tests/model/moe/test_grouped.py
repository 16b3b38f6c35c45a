"""The grouped operator: what it keeps, that it never waits, and that graphs, checkpoints and counters see it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from kha_train.errors import ConfigError
from kha_train.model.device import resolve_on
from kha_train.model.kernels.movement import combine_torch, permute_torch
from kha_train.model.kernels.weighted_swiglu import backward_torch, forward_torch
from kha_train.model.moe.experts import grouped, loop
from kha_train.model.moe.flops import OPERATORS
from kha_train.model.moe.grouped import (
    KERNELS,
    Placement,
    check_empty_groups,
    grouped_experts,
    grouped_experts_backward,
    grouped_product,
    place,
    run_backward,
    run_forward,
    tile_padding,
)
from kha_train.model.moe.layer import MoeLayer
from kha_train.model.moe.router import Routing, count_experts
from kha_train.model.moe.swiglu import weighted_swiglu

N, D, F, E, J = 20, 16, 8, 6, 3
M = N * J


def route(tokens: int = N, experts: int = E, top_k: int = J) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.stack([torch.randperm(experts, generator=generator)[:top_k] for _ in range(tokens)])


def problem(dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Routing]:
    """x, gate and up, down, weights; and where the tokens go."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(N, D), (E, D, 2 * F), (E, F, D), (N, J)]
    leaves = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    leaves[3] = leaves[3].float()
    expert_NJ = route()
    leaves = [leaf.requires_grad_() for leaf in leaves]
    return leaves, Routing(expert_NJ, leaves[3], count_experts(expert_NJ, E))


def placement() -> Placement:
    expert_NJ = route()
    return place(expert_NJ, count_experts(expert_NJ, E))


def test_copies_are_sorted_by_expert_and_by_token_within_an_expert() -> None:
    order_M, home_NJ, ends_E = placement()
    sorted_M = route().flatten()[order_M]
    assert torch.equal(sorted_M, sorted_M.sort().values)
    assert torch.equal(ends_E.long(), torch.bincount(sorted_M, minlength=E).cumsum(0)) and ends_E.dtype == torch.int32
    assert torch.equal(order_M[home_NJ.flatten()], torch.arange(M))
    for expert in range(E):
        assert order_M[sorted_M == expert].diff().gt(0).all()


def test_permute_and_combine_are_each_others_transpose() -> None:
    order_M, home_NJ, _ = placement()
    generator = torch.Generator().manual_seed(5)
    x_ND, y_MD = (torch.randn(rows, 3, generator=generator, dtype=torch.float64) for rows in (N, M))
    assert torch.equal(permute_torch(x_ND, order_M, home_NJ), x_ND[order_M // J])
    left = (permute_torch(x_ND, order_M, home_NJ) * y_MD).sum()
    torch.testing.assert_close(left, (x_ND * combine_torch(y_MD, home_NJ)).sum())


def test_the_activation_and_its_backward_are_those_of_autograd() -> None:
    order_M = placement().order_M
    generator = torch.Generator().manual_seed(7)
    gate_up_MX, weight_NJ, grad_MF = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((M, 2 * F), (N, J), (M, F))
    )
    inputs = [gate_up_MX.clone().requires_grad_(), weight_NJ.clone().requires_grad_()]
    hidden_MF = weighted_swiglu(inputs[0], inputs[1].flatten()[order_M])
    expected = (hidden_MF.detach(), *torch.autograd.grad(hidden_MF, inputs, grad_MF))
    torch.testing.assert_close(forward_torch(gate_up_MX, weight_NJ, order_M), expected[0])
    for found, wanted in zip(backward_torch(gate_up_MX, weight_NJ, order_M, grad_MF), expected, strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("top_k", [1, 2, 5, 8])
@pytest.mark.parametrize("tokens", [1, 7])
def test_it_equals_the_loop_for_any_number_of_experts_a_token(top_k: int, tokens: int) -> None:
    generator = torch.Generator().manual_seed(2)
    expert_NJ = route(tokens, 8, top_k)
    shapes = [(tokens, D), (8, D, 2 * F), (8, F, D), (tokens, top_k)]
    leaves = [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]
    routing = Routing(expert_NJ, leaves[3], count_experts(expert_NJ, 8))
    target_ND = torch.randn(tokens, D, generator=generator)
    answers = [
        (out, *torch.autograd.grad(out, leaves, target_ND))
        for out in (f(*leaves[:3], routing) for f in (loop, grouped))
    ]
    for expected, found in zip(*answers, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_tokens_and_weights_may_lie_anyhow_in_memory() -> None:
    leaves, routing = problem()
    lying = [leaf.detach().t().contiguous().t().requires_grad_() for leaf in (leaves[0], leaves[3])]
    answers = []
    for x_ND, weight_NJ in ((leaves[0], leaves[3]), lying):
        out = grouped(x_ND, *leaves[1:3], routing._replace(weight_NJ=weight_NJ))
        answers.append((out, *torch.autograd.grad(out.square().sum(), (x_ND, *leaves[1:3], weight_NJ))))
    assert all(torch.equal(expected, found) for expected, found in zip(*answers, strict=True))


def test_bf16_is_as_close_to_fp32_as_bf16_can_be() -> None:
    answers = []
    for dtype in (torch.float32, torch.bfloat16):
        leaves, routing = problem(torch.bfloat16)
        leaves = [leaf.detach().to(dtype).requires_grad_() for leaf in leaves[:3]] + leaves[3:]
        out = grouped(*leaves[:3], routing)
        target = torch.linspace(-1, 1, out.numel()).view_as(out).to(dtype)
        answers.append((out, *torch.autograd.grad(out, leaves, target)))
    for expected, found in zip(*answers, strict=True):
        assert (found.float() - expected).norm() < 1e-2 * expected.norm()


def test_of_the_copies_only_the_first_product_is_kept_for_the_backward() -> None:
    leaves, routing = problem()
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        grouped(*leaves[:3], routing)
    rows = sorted(
        tuple(tensor.shape) for tensor in kept.values() if tensor.is_floating_point() and tensor.shape[0] == M
    )
    assert rows == [(M, 2 * F)]
    own = {leaf.data_ptr() for leaf in leaves}
    assert sum(tensor.numel() for place, tensor in kept.items() if place not in own) == M * 2 * F + 2 * M + E


def test_nothing_in_a_layer_or_inside_the_operator_waits_for_the_device(make_config) -> None:
    """On the meta device there are no values: whatever asks for one (`item`, `tolist`, `nonzero`, `cpu`) fails."""
    config = make_config(moe={"routing_warmup_steps": 10, "z_loss_weight": 0.1, "expert_groups": 4, "top_groups": 2})
    width, inner = config.model.hidden_size, config.moe.expert_width
    resolved = resolve_on(config, torch.device("cpu"))
    with torch.device("meta"):
        layer = MoeLayer(config, resolved, 0)
        x_BTD = torch.empty(2, 24, width, requires_grad=True)
        y_BTD, routing = layer(x_BTD, torch.empty(2, dtype=torch.int64))
        (y_BTD.sum() + routing.z_sum).backward()
    assert x_BTD.grad is not None and layer.experts.down.grad is not None and layer.router.weight.grad is not None
    x_ND, up, down = (
        torch.empty(shape, dtype=torch.bfloat16, device="meta")
        for shape in ((48, width), (config.moe.experts, width, 2 * inner), (config.moe.experts, inner, width))
    )
    weight_NJ, found, kernels = routing.weight_NJ.detach(), place(routing.expert_NJ, routing.load_E), KERNELS["torch"]
    out_ND, gate_up_MX = run_forward(x_ND, up, down, weight_NJ, found, kernels)
    grads = run_backward(out_ND, x_ND, up, down, weight_NJ, found, gate_up_MX, kernels)
    assert [grad.shape for grad in grads] == [x_ND.shape, up.shape, down.shape, weight_NJ.shape]
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        loop(x_ND, up, down, routing)


def test_torch_admits_both_operators() -> None:
    leaves, _ = problem()
    torch.library.opcheck(grouped_experts, (*leaves, *placement(), "torch"))
    plain = [leaf.detach() for leaf in leaves]
    torch.library.opcheck(grouped_experts_backward, (plain[0], *plain, *placement(), torch.ones(M, 2 * F), "torch"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_compiles_into_one_graph_with_the_same_numbers(dtype: torch.dtype) -> None:
    compiled = torch.compile(grouped, backend="aot_eager", fullgraph=True)
    answers = []
    for run in (grouped, compiled):
        leaves, routing = problem(dtype)
        out = run(*leaves[:3], routing)
        answers.append((out, *torch.autograd.grad(out.float().square().sum(), leaves)))
    assert all(torch.equal(expected, found) for expected, found in zip(*answers, strict=True))


def test_twice_and_recomputed_under_a_checkpoint_it_gives_the_same_bits() -> None:
    answers = []
    for run in (grouped, grouped, lambda *given: checkpoint(grouped, *given, use_reentrant=False)):
        leaves, routing = problem()
        out = run(*leaves[:3], routing)
        answers.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    for other in answers[1:]:
        assert all(torch.equal(expected, found) for expected, found in zip(answers[0], other, strict=True))


def test_its_products_are_counted_as_those_of_the_loop() -> None:
    assert len(OPERATORS) == 2
    counted = []
    for backend in (loop, grouped):
        leaves, routing = problem()
        with FlopCounterMode(display=False) as counter:
            backend(*leaves[:3], routing).sum().backward()
        counted.append(counter.get_total_flops())
    assert counted[0] == counted[1] == 3 * 6 * M * D * F


def test_tile_padding_rounds_every_expert_up_and_none_that_is_idle() -> None:
    assert tile_padding(torch.tensor([128, 256, 0])) == 1.0
    assert tile_padding(torch.tensor([1, 127, 0])) == 2.0
    assert tile_padding(torch.tensor([100, 60]), tile_rows=64) == pytest.approx((128 + 64) / 160)


def test_weights_that_are_frozen_leave_the_rest_its_gradient() -> None:
    leaves, routing = problem()
    out = grouped(leaves[0], nn.Parameter(leaves[1].detach(), requires_grad=False), leaves[2].detach(), routing)
    found = torch.autograd.grad(out.square().sum(), (leaves[0], leaves[3]))
    out = loop(*leaves[:3], routing)
    for wanted, grad in zip(torch.autograd.grad(out.square().sum(), (leaves[0], leaves[3])), found, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-4)


def test_a_device_that_gives_experts_without_tokens_a_gradient_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_empty_groups(torch.device("cpu"), torch.float32)

    def leaves_what_lay_there(left, right, offs):
        out = grouped_product(left, right, offs=offs)
        return out.clone().index_fill_(0, torch.tensor([1]), 1e-3)

    monkeypatch.setattr("kha_train.model.moe.grouped.grouped_product", leaves_what_lay_there)
    with pytest.raises(ConfigError, match="for experts without tokens") as refused:
        check_empty_groups(torch.device("cpu"), torch.float32)
    assert refused.value.fix == "moe.backend=loop"
