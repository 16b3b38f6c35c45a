"""Experts: the loop against its formula, grouped against the loop, forward and backward."""

from functools import partial
from importlib.util import find_spec

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.checkpoint import checkpoint

from kha_train.config.resolve import Device, decide
from kha_train.errors import ConfigError
from kha_train.model.decoder import build_decoder
from kha_train.model.moe import parallel
from kha_train.model.moe.experts import grouped, loop
from kha_train.model.moe.megablocks import NEEDED, Kernels, load_kernels, run_kernels
from kha_train.model.moe.parallel import ExpertRanks, run_exchanged
from kha_train.model.moe.router import Routing, count_experts

N, D, F, E, J = 24, 16, 8, 6, 2


def choices(kind):
    generator = torch.Generator().manual_seed(3)
    if kind == "spread":
        return torch.stack([torch.randperm(E, generator=generator)[:J] for _ in range(N)])
    if kind == "two experts take all":
        return torch.tensor([[4, 1]]).repeat(N, 1)
    skewed_N = torch.where(torch.arange(N) < N - 2, 5, 3)
    return torch.stack((skewed_N, torch.zeros(N, dtype=torch.int64)), 1)


def problem(kind, dtype):
    generator = torch.Generator().manual_seed(1)
    shapes = [(N, D), (E, D, 2 * F), (E, F, D), (N, J)]
    leaves = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]
    x_ND, gate_up, down, weight_NJ = leaves
    expert_NJ = choices(kind)
    return leaves, (x_ND, gate_up, down, Routing(expert_NJ, weight_NJ, count_experts(expert_NJ, E)))


KINDS = ("spread", "two experts take all", "skewed with empty experts")


@pytest.mark.parametrize("kind", KINDS)
def test_the_loop_is_the_formula_one_token_at_a_time(kind):
    _, (x_ND, gate_up, down, routing) = problem(kind, torch.float64)
    expected = torch.zeros_like(x_ND)
    for n in range(N):
        for j in range(J):
            e = routing.expert_NJ[n, j]
            gate, up = x_ND[n] @ gate_up[e, :, :F], x_ND[n] @ gate_up[e, :, F:]
            expected[n] += routing.weight_NJ[n, j] * ((functional.silu(gate) * up) @ down[e])
    torch.testing.assert_close(loop(x_ND, gate_up, down, routing), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_grouped_equals_the_loop_forward_and_backward(kind):
    results = []
    for backend in (loop, grouped):
        leaves, arguments = problem(kind, torch.float32)
        out = backend(*arguments)
        target = torch.linspace(-1, 1, out.numel()).view_as(out)
        results.append((out.detach(), *torch.autograd.grad((out * target).sum(), leaves)))
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_a_broadcast_gradient_reaches_the_grouped_experts():
    leaves, arguments = problem("spread", torch.float32)
    grouped(*arguments).sum().backward()
    assert all(leaf.grad.isfinite().all() and leaf.grad.any() for leaf in leaves)


def test_the_loop_passes_gradcheck_in_float64():
    leaves, (_, _, _, routing) = problem("spread", torch.float64)

    def run(x_ND, gate_up, down, weight_NJ):
        return loop(x_ND, gate_up, down, Routing(routing.expert_NJ, weight_NJ, routing.load_E))

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


@pytest.mark.parametrize(("section", "field"), [("moe", "expert_width"), ("model", "hidden_size")])
def test_a_width_the_grouped_backend_cannot_read_is_a_configuration_error(section, field, make_config):
    with pytest.raises(ConfigError, match=f"{section}.{field} = 100.*multiples of 8.*96 or 104.*moe.backend=loop"):
        build_decoder(make_config(**{section: {field: 100}}))
    moe = {"backend": "loop"} | ({field: 100} if section == "moe" else {})
    model = {field: 100} if section == "model" else {}
    build_decoder(make_config(moe=moe, model=model))


class TorchKernels:
    """What megablocks' operations do, in torch: the adapter is tested without the package."""

    @staticmethod
    def sort(values, bits):
        assert values.dtype == torch.int32 and int(values.max()) < 2**bits
        return values.sort(stable=True)

    @staticmethod
    def inclusive_cumsum(values, dim):
        # megablocks 0.10 squeezes what it returns.
        return values.cumsum(dim).squeeze()

    @staticmethod
    def gather(x, indices, bin_ids, bins, top_k):
        assert torch.equal(torch.bincount(bin_ids, minlength=bins.numel()).cumsum(0), bins.long())
        return x[indices // top_k]

    @staticmethod
    def scatter(x, indices, bin_ids, weights, bins, top_k):
        assert weights is None
        return torch.zeros(x.shape[0] // top_k, x.shape[1], dtype=x.dtype).index_add(0, indices // top_k, x)


def gmm(x, weight, counts):
    assert counts.device.type == "cpu" and counts.dtype == torch.int64
    return torch.cat([part @ weight[i] for i, part in enumerate(x.split(counts.tolist()))])


@pytest.mark.parametrize("kind", KINDS)
def test_the_megablocks_adapter_equals_the_loop_forward_and_backward(kind):
    results = []
    for backend in (loop, partial(run_kernels, Kernels(TorchKernels, gmm))):
        leaves, arguments = problem(kind, torch.float64)
        out = backend(*arguments)
        target = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        results.append((out.detach(), *torch.autograd.grad((out * target).sum(), leaves)))
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


def test_the_megablocks_adapter_takes_a_single_expert():
    generator = torch.Generator().manual_seed(2)
    x_ND, gate_up, down = (torch.randn(s, generator=generator) for s in ((N, D), (1, D, 2 * F), (1, F, D)))
    expert_NJ = torch.zeros(N, 1, dtype=torch.int64)
    routing = Routing(expert_NJ, torch.ones(N, 1), count_experts(expert_NJ, 1))
    expected = (functional.silu(x_ND @ gate_up[0, :, :F]) * (x_ND @ gate_up[0, :, F:])) @ down[0]
    torch.testing.assert_close(run_kernels(Kernels(TorchKernels, gmm), x_ND, gate_up, down, routing), expected)


@pytest.mark.parametrize("backend", [loop, grouped, partial(run_kernels, Kernels(TorchKernels, gmm))])
@pytest.mark.parametrize("tokens", [0, 3])
def test_ranks_that_share_experts_recompute_alike_even_where_no_row_arrives(backend, tokens, monkeypatch):
    """The messages of a forward, and of a backward with recomputation; of two ranks the other is a copy."""
    leaves, (_, gate_up, down, _) = problem("spread", torch.float32)
    x_ND, weight_NJ = (leaves[at].detach()[:tokens].requires_grad_() for at in (0, 3))
    routing = Routing(choices("spread")[:tokens], weight_NJ, count_experts(choices("spread")[:tokens], 2 * E))
    sent = []

    def noted(received, given, receives=None, sends=None, group=None):
        sent.append(given.shape[1:])
        dist.all_to_all_single(received, given, receives, sends, group=group)

    monkeypatch.setattr(parallel, "all_to_all", noted)
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        share = partial(run_exchanged, ExpertRanks(dist.group.WORLD, 0, 2), "torch", backend)
        checkpoint(share, x_ND, gate_up, down, routing, use_reentrant=False).sum().backward()
    finally:
        dist.destroy_process_group()
    lengths, row, weight = (E,), (D,), (1,)
    assert sent == [lengths, row, weight, row, row, lengths, row, weight, weight, row]


def test_without_megablocks_the_missing_packages_and_the_command_are_named(make_config):
    if all(find_spec(name) for name in NEEDED):
        pytest.skip("megablocks is installed")
    config = make_config(moe={"backend": "megablocks"})
    with pytest.raises(ConfigError, match="not installed: .*grouped_gemm.*moe.backend=grouped.*pip install --no-deps"):
        build_decoder(config, decide(config, Device("cuda", (9, 0))))


@pytest.mark.gpu
@pytest.mark.skipif(not all(find_spec(name) for name in NEEDED), reason="megablocks is not installed")
@pytest.mark.parametrize("kind", KINDS)
def test_megablocks_itself_equals_the_loop(kind):
    kernels = load_kernels()
    _, (x_ND, gate_up, down, routing) = problem(kind, torch.bfloat16)
    on_device = [tensor.detach().cuda() for tensor in (x_ND, gate_up, down)]
    moved = Routing(routing.expert_NJ.cuda(), routing.weight_NJ.detach().cuda(), routing.load_E.cuda())
    torch.testing.assert_close(
        run_kernels(kernels, *on_device, moved).cpu(), loop(x_ND, gate_up, down, routing), rtol=2e-2, atol=2e-2
    )
