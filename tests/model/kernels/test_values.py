"""Kernels give the values and gradients of their plain twins: on a GPU, or anywhere in Triton's interpreter.

`test_interpreted.py` runs this file with TRITON_INTERPRET=1 in a process of its own.
"""

# B batch   T tokens   H heads   K head width   R rotation planes

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kha_train.config.compose import compose
from kha_train.config.resolve import interpreted
from kha_train.heads import maths
from kha_train.model.decoder import build_decoder
from kha_train.model.device import resolve_on
from kha_train.model.kernels.knocking_mlp import knocking_mlp
from kha_train.model.kernels.norm_rotate import norm_rotate, plain_norm_rotate
from kha_train.model.rope import rotary_table

pytestmark = (
    []
    if interpreted()
    else [
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, or TRITON_INTERPRET=1"),
    ]
)
DEVICE = "cpu" if interpreted() else "cuda"
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-2}
"""Relative error (Frobenius) against float64. The interpreter rounds to bfloat16 by cutting off."""
DTYPES = list(TOLERANCE) if interpreted() else [torch.bfloat16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def values_of_a_buffer(dtype: torch.dtype, width: int, batch: int = 2, tokens: int = 37) -> Tensor:
    """Two heads in the middle of six that one projection made."""
    return random(batch, tokens, 6 * width, dtype=dtype).unflatten(-1, (6, width))[:, :, 2:4]


def matrices(dtype: torch.dtype, width: int, down: bool) -> list[Tensor]:
    noise = [0.3 * random(width, width, dtype=dtype, seed=seed) / width**0.5 for seed in (1, 2, 3)]
    identity = torch.eye(width, dtype=dtype, device=DEVICE)
    return [identity + noise[0], noise[1], identity + noise[2]][: 3 if down else 2]


def angles(tokens: int, planes: int) -> tuple[Tensor, Tensor]:
    """Of two rows, whose positions are neither sorted nor alike."""
    positions = torch.randint(0, 64, (2, tokens), generator=torch.Generator().manual_seed(5))
    cos_PR, sin_PR = rotary_table(64, 2 * planes, 1e4)
    return cos_PR[positions].to(DEVICE), sin_PR[positions].to(DEVICE)


def perceptron(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x, up, gate, down=None: function(x, up, gate, down)


def outputs_and_gradients(function: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    return [out, *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


def compare(kernel: Callable[..., Tensor], plain: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor) -> None:
    """Outputs and all gradients against float64; the kernel's in the dtype of the input."""
    found = outputs_and_gradients(kernel, inputs, grad)
    expected = outputs_and_gradients(plain, [x.double() for x in inputs], grad)
    for index, (got, wanted) in enumerate(zip(found, expected, strict=True)):
        assert got.dtype == inputs[0].dtype and got.shape == wanted.shape
        error = ((got.double() - wanted).norm() / wanted.norm()).item()
        assert error < TOLERANCE[inputs[0].dtype], (index, error)


def laid_out_by_heads(x_BTHK: Tensor) -> Tensor:
    """The same numbers as attention kernels hand back gradients: [B, H, T, K] in memory."""
    return x_BTHK.transpose(1, 2).contiguous().transpose(1, 2)


@every_dtype
@pytest.mark.parametrize("down", [False, True], ids=["folded", "unfolded"])
@pytest.mark.parametrize("width", [16, 32, 64, 128])
def test_the_perceptron_reads_a_slice_of_a_projection_and_takes_any_gradient(width: int, down: bool, dtype) -> None:
    x_BTHK = values_of_a_buffer(dtype, width)
    grad_BTHK = laid_out_by_heads(random(2, 37, 2, width, dtype=dtype, seed=9))
    assert not x_BTHK.is_contiguous() and not grad_BTHK.is_contiguous()
    compare(perceptron(knocking_mlp), perceptron(maths.perceptron), [x_BTHK, *matrices(dtype, width, down)], grad_BTHK)


@pytest.mark.parametrize("tokens", [1, 31, 32, 33, 128, 400])
def test_the_perceptron_takes_any_number_of_rows(tokens: int) -> None:
    """Less than a tile, whole tiles, one row more, more tiles than programs."""
    dtype = DTYPES[-1]
    x_BTHK, grad_BTHK = values_of_a_buffer(dtype, 64, 1, tokens), random(1, tokens, 2, 64, dtype=dtype, seed=9)
    compare(perceptron(knocking_mlp), perceptron(maths.perceptron), [x_BTHK, *matrices(dtype, 64, True)], grad_BTHK)


LAYOUTS = {
    "every other token": lambda x: x[:, ::2],
    "heads first": lambda x: x.transpose(1, 2),
    "width before heads": lambda x: x.transpose(2, 3),
    "one token, heads first": lambda x: x[:, :, :1].contiguous().transpose(1, 2),
}


@pytest.mark.parametrize("view", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_the_perceptron_takes_layouts_that_no_projection_makes(view: Callable[[Tensor], Tensor]) -> None:
    x_BTHK = view(random(2, 16, 16, 16, dtype=DTYPES[-1]))
    grad_BTHK = random(*x_BTHK.shape, dtype=DTYPES[-1], seed=9)
    inputs = [x_BTHK, *(matrix.T for matrix in matrices(DTYPES[-1], 16, True))]
    compare(perceptron(knocking_mlp), perceptron(maths.perceptron), inputs, grad_BTHK)


@every_dtype
def test_the_perceptron_starts_as_the_identity_bit_for_bit(dtype) -> None:
    x_BTHK, identity = values_of_a_buffer(dtype, 64), torch.eye(64, dtype=dtype, device=DEVICE)
    gate = torch.zeros_like(identity)
    assert torch.equal(knocking_mlp(x_BTHK, identity, gate, None), x_BTHK)
    assert torch.equal(knocking_mlp(x_BTHK, identity, gate, identity), x_BTHK)


@every_dtype
@pytest.mark.parametrize(("width", "planes"), [(16, 8), (64, 32), (64, 8), (64, 12), (128, 64), (256, 128)])
def test_norm_and_rotation_are_those_of_torch(width: int, planes: int, dtype) -> None:
    x_BTHK, weight_K = values_of_a_buffer(dtype, width), 1 + 0.3 * random(width, dtype=dtype, seed=4)
    grad_BTHK, tables = laid_out_by_heads(random(2, 37, 2, width, dtype=dtype, seed=9)), angles(37, planes)
    compare(
        lambda x, weight: norm_rotate(x, weight, *tables, 1e-6),
        lambda x, weight: plain_norm_rotate(x, weight, *tables, 1e-6),
        [x_BTHK, weight_K],
        grad_BTHK,
    )


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 300])
def test_norm_and_rotation_take_any_number_of_rows(tokens: int) -> None:
    tables, dtype = angles(tokens, 8), DTYPES[-1]
    compare(
        lambda x, weight: norm_rotate(x, weight, *tables, 1e-6),
        lambda x, weight: plain_norm_rotate(x, weight, *tables, 1e-6),
        [values_of_a_buffer(dtype, 16, 2, tokens), 1 + random(16, dtype=dtype, seed=4)],
        random(2, tokens, 2, 16, dtype=dtype, seed=9),
    )


def operator_calls(dtype: torch.dtype) -> dict[str, tuple[Any, tuple]]:
    x_BTHK = values_of_a_buffer(dtype, 16, tokens=5).detach().requires_grad_()
    leaves = [matrix.requires_grad_() for matrix in matrices(dtype, 16, True)]
    weight_K = random(16, dtype=dtype).requires_grad_()
    return {
        "folded perceptron": (knocking_mlp, (x_BTHK, *leaves[:2], None)),
        "perceptron": (knocking_mlp, (x_BTHK, *leaves)),
        "norm and rotation": (norm_rotate, (x_BTHK, weight_K, *angles(5, 8), 1e-6)),
    }


@pytest.mark.parametrize("name", ["folded perceptron", "perceptron", "norm and rotation"])
def test_an_operator_keeps_the_rules_of_torch(name: str) -> None:
    """Its schema, its autograd, and that its fake kernel gives the shapes and strides of the real one."""
    operator, arguments = operator_calls(DTYPES[0])[name]
    torch.library.opcheck(operator, arguments)


class Layer(nn.Module):
    """Both operators, as attention uses them, on rows of 37 tokens."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.matrices = nn.ParameterList(matrices(dtype, 16, True))
        self.gain = nn.Parameter(1 + random(16, dtype=dtype, seed=4))
        self.cos_BTR, self.sin_BTR = angles(37, 8)

    def forward(self, x_BTHK: Tensor) -> Tensor:
        """[B, T, H, K] -> the same."""
        turned_BTHK = norm_rotate(x_BTHK, self.gain, self.cos_BTR, self.sin_BTR, 1e-6)
        return turned_BTHK + knocking_mlp(x_BTHK, self.matrices[0], self.matrices[1], None)


def layer_gradients(run: Callable[[Tensor], Tensor], layer: Layer, x_BTHK: Tensor) -> list[Tensor]:
    leaves = [x_BTHK, layer.gain, *list(layer.matrices)[:2]]
    return list(torch.autograd.grad(run(x_BTHK).square().sum(), leaves))


def test_a_compiled_graph_holds_each_operator_as_one_node() -> None:
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    layer, x_BTHK = Layer(DTYPES[0]), values_of_a_buffer(DTYPES[0], 16).detach().requires_grad_()
    expected = layer_gradients(layer, layer, x_BTHK)
    compiled = torch.compile(layer, fullgraph=True, backend=keep)
    for found, wanted in zip(layer_gradients(compiled, layer, x_BTHK), expected, strict=True):
        torch.testing.assert_close(found, wanted)
    (graph,) = graphs
    called = [str(node.target) for node in graph.graph.nodes if "kha_train" in str(node.target)]
    assert sorted(called) == ["kha_train.knocking_mlp.default", "kha_train.norm_rotate.default"]


def test_the_backward_keeps_nothing_but_the_inputs_and_recomputation_changes_no_bit() -> None:
    layer, x_BTHK = Layer(DTYPES[0]), values_of_a_buffer(DTYPES[0], 16).detach().requires_grad_()
    kept: list[int] = []
    inputs = {tensor.data_ptr() for tensor in (x_BTHK, *layer.parameters())}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.data_ptr()) or x, lambda x: x):
        knocking_mlp(x_BTHK, *layer.matrices)
    assert kept and set(kept) <= inputs
    expected = layer_gradients(layer, layer, x_BTHK)
    found = layer_gradients(lambda x: checkpoint(layer, x, use_reentrant=False), layer, x_BTHK)
    assert all(torch.equal(got, wanted) for got, wanted in zip(found, expected, strict=True))


def test_a_decoder_on_kernels_is_the_decoder_without() -> None:
    """Same weights, whole model: the loss and every gradient."""
    shape = ["model.hidden_size=32", "model.head_dim=16", "model.query_heads=2", "model.kv_heads=1", "model.seq_len=16"]
    small = ["model=tiny", *shape, "model.layers=2", "model.vocab_size=64", "moe.expert_width=16", "moe.backend=loop"]
    dtype = torch.float32 if interpreted() else torch.bfloat16
    # Rounding in bf16 would send a token to another expert: there all of them have it.
    every = [] if interpreted() else ["moe.experts=4", "moe.top_k=4"]
    config = compose([*small, *every, "attention=kha_mlp", "engine.micro_batch_size=2"])
    tokens_BT = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    answers = []
    for kernels in ("torch", "triton"):
        chosen = replace(config, engine=replace(config.engine, kernels=kernels))
        decoder = build_decoder(chosen, resolve_on(chosen, torch.device(DEVICE))).to(DEVICE)
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in decoder.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(DEVICE))
                parameter.data = parameter.data.to(dtype)
        loss = decoder(tokens_BT, tokens_BT).loss_sum
        answers.append([loss, *torch.autograd.grad(loss, list(decoder.parameters()))])
    names = {type(module).__name__ for module in decoder.modules()}
    assert "TurningNorm" in names and decoder.blocks[0].attention.interaction.fused
    for found, expected in zip(*answers, strict=True):
        error = (found.double() - expected.double()).norm() / expected.double().norm()
        assert error < (1e-5 if interpreted() else 5e-2)
