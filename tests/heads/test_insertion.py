"""What is inserted starts as nothing, computes the published formulas, and survives what people do to models."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from kha_train.heads import HeadsError, insert
from kha_train.heads.layouts import Piece

LAYOUTS = {"TinyAttention": "transformers"}
IDENTITIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mlp": ("kha_mlp", {}),
    "mlp of every head": ("kha_mlp", {"projections": ("q", "k", "v"), "share": "none"}),
    "linear": ("kha_linear", {}),
    "linear of every head": ("kha_linear", {"share": "none"}),
    "gate": ("kha_gate", {}),
    "composition": ("mea", {"head_norm": False}),
}
ALL = {
    **IDENTITIES,
    "explicit": ("mea", {}),
    "norm alone": ("mea", {"compose": ()}),
    "output gate": ("gated", {}),
    "mlp and a gate of every head": ("kha_mlp", {"output_gate": "headwise"}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", IDENTITIES)
def test_an_insertion_changes_no_bit(name: str, dtype: torch.dtype, tiny, x_BTD) -> None:
    interaction, options = IDENTITIES[name]
    stock, model = tiny().to(dtype), insert(tiny().to(dtype), interaction, layouts=LAYOUTS, **options)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert torch.equal(model(x_BTD.to(dtype)), stock(x_BTD.to(dtype)))


def test_only_the_norm_of_mea_and_an_output_gate_change_a_model_at_once(tiny, x_BTD) -> None:
    assert not torch.equal(tiny("mea")(x_BTD), tiny()(x_BTD))
    assert not torch.equal(tiny("gated")(x_BTD), tiny()(x_BTD))


@pytest.mark.parametrize(("output_gate", "width"), [("headwise", 1), ("elementwise", 6)])
def test_outputs_are_multiplied_by_gates_that_read_the_input(output_gate: str, width: int, tiny, moved, x_BTD) -> None:
    """y = o * sigmoid(x W) of Qiu et al. (2025), between softmax(QK)V and the output projection: in numpy."""
    model = moved(tiny("gated", output_gate=output_gate).double())
    attention, x = model.layers[0], x_BTD.double()
    outputs = torch.randn(2, 7, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    attention.q_proj(x)
    found = attention.o_proj(outputs)
    weight = attention.kha.gate.weight.detach().numpy()
    assert weight.shape == (4 * width, 24)
    gates = 1 / (1 + np.exp(-(x.numpy() @ weight.T)))
    gated = (outputs.numpy().reshape(2, 7, 4, 6) * gates.reshape(2, 7, 4, width)).reshape(2, 7, 24)
    expected = gated @ attention.o_proj.weight.detach().numpy().T + attention.o_proj.bias.detach().numpy()
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-12, atol=1e-14)


def test_gates_of_one_half_halve_what_attention_writes(tiny, x_BTD) -> None:
    gated, stock = tiny("gated").layers[0], tiny().layers[0]
    bias = stock.o_proj.bias
    torch.testing.assert_close(gated(x_BTD) - bias, (stock(x_BTD) - bias) / 2)


def test_values_go_through_the_published_perceptron(tiny, moved, x_BTD) -> None:
    """KHA eq 9, head by head and in numpy: 2 ((v U) * sigmoid(v G)) W."""
    stock, model = tiny().double(), moved(tiny("kha_mlp").double())
    x = x_BTD.double()
    up, gate, down = (model.layers[0].kha.v.get_parameter(name).detach().numpy() for name in ("up", "gate", "down"))
    heads = stock.layers[0].v_proj(x).detach().numpy().reshape(2, 7, 2, 6)
    expected = [2 * ((v @ up) / (1 + np.exp(-(v @ gate)))) @ down for v in np.moveaxis(heads, 2, 0)]
    found = model.layers[0].v_proj(x).detach().numpy()
    np.testing.assert_allclose(found, np.concatenate(expected, axis=-1), rtol=1e-12, atol=1e-14)
    assert torch.equal(model.layers[0].k_proj(x), stock.layers[0].k_proj(x))


def test_mea_sums_heads_and_normalises_their_outputs(tiny, moved, x_BTD) -> None:
    """MEA eq 10 to 12, number by number."""
    stock, model = tiny().double(), moved(tiny("mea").double())
    x, heads = x_BTD.double(), model.layers[0].kha
    keys = stock.layers[0].k_proj(x).unflatten(-1, (2, 6))
    composed = [sum(keys[:, :, i] * heads.k.across[i, o] for i in range(2)) for o in range(2)]
    torch.testing.assert_close(model.layers[0].k_proj(x), torch.cat(composed, -1), rtol=1e-12, atol=1e-14)
    outputs = torch.randn(3, 24, dtype=torch.float64)
    scale = (outputs.view(3, 4, 6).square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    expected = (outputs.view(3, 4, 6) * scale * heads.output.gain).flatten(1)
    torch.testing.assert_close(
        model.layers[0].o_proj(outputs), stock.layers[0].o_proj(expected), rtol=1e-12, atol=1e-14
    )


@pytest.mark.parametrize("name", ALL)
def test_gradients_of_inputs_and_inserted_parameters_are_right(name: str, tiny, moved) -> None:
    interaction, options = ALL[name]
    attention = moved(tiny(interaction, **options).double()).layers[0]
    names, values = zip(*attention.kha.named_parameters(prefix="kha"), strict=True)

    def run(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(attention, dict(zip(names, parameters, strict=True)), (x,))

    x = torch.randn(1, 3, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(2), requires_grad=True)
    assert torch.autograd.gradcheck(run, (x, *values), fast_mode=True)


def test_a_piece_of_a_fused_projection_is_changed_and_nothing_else() -> None:
    """Blocks of 5 from number 3 on, in each of which a head has numbers 1 and 2."""
    piece = Piece("p", outputs=15, heads=2, width=2, block=5, start=3, offset=1)
    x = torch.arange(15.0).expand(4, 15)
    expected = x.clone()
    expected[:, [4, 5, 9, 10]] *= 10
    assert torch.equal(piece.changed(x, lambda heads: 10 * heads), expected)
    assert piece.changed(x, lambda heads: heads * heads.shape[-2])[0, 4] == 8


def test_a_tensor_parallel_share_of_a_projection_has_fewer_heads() -> None:
    piece = Piece("p", outputs=12, heads=4, width=3, block=3)
    matrix = torch.randn(3, 3, generator=torch.Generator().manual_seed(3))
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(4))
    halves = [piece.changed(half, lambda heads: heads @ matrix) for half in x.split(6, dim=-1)]
    torch.testing.assert_close(torch.cat(halves, -1), piece.changed(x, lambda heads: heads @ matrix))


def test_recomputation_gives_the_same_gradients(tiny, moved, x_BTD) -> None:
    def gradients(recompute: bool) -> list[torch.Tensor]:
        model = moved(tiny("kha_mlp", output_gate="elementwise"))
        x = x_BTD.clone().requires_grad_()
        for layer in model.layers:
            x = x + (checkpoint(layer, x, use_reentrant=False) if recompute else layer(x))
        x.square().sum().backward()
        return [parameter.grad for parameter in model.parameters()]

    assert all(map(torch.equal, gradients(True), gradients(False)))


def test_a_copy_has_its_own_heads(tiny, moved, x_BTD) -> None:
    model = moved(tiny("kha_mlp", output_gate="headwise"))
    copied, before = copy.deepcopy(model), model(x_BTD)
    assert torch.equal(copied(x_BTD), before)
    with torch.no_grad():
        copied.layers[0].kha.v.down.zero_()
    assert torch.equal(model(x_BTD), before) and not torch.equal(copied(x_BTD), before)


def test_parameters_of_fp32_serve_a_model_of_another_dtype(tiny, x_BTD) -> None:
    stock = tiny().bfloat16()
    model = insert(tiny().bfloat16(), "kha_mlp", layouts=LAYOUTS, dtype=torch.float32)
    assert model.layers[0].kha.v.up.dtype == torch.float32
    assert torch.equal(model(x_BTD.bfloat16()), stock(x_BTD.bfloat16()))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(tiny("kha_linear")(x_BTD), tiny()(x_BTD))


def test_a_model_on_meta_gets_its_values_when_it_is_made(tiny, x_BTD) -> None:
    with torch.device("meta"):
        model = tiny("kha_mlp")
    assert model.layers[0].kha.v.up.is_meta
    model.to_empty(device="cpu")
    stock = tiny()
    model.load_state_dict(stock.state_dict(), strict=False)
    for layer in model.layers:
        layer.kha.v.reset_parameters()
    assert torch.equal(model(x_BTD), stock(x_BTD))


class Strange(nn.Module):
    """Something with an attention that nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(4, 2)


def test_an_unknown_model_is_told_what_was_looked_for() -> None:
    with pytest.raises(HeadsError) as caught:
        insert(Strange(), "kha_mlp")
    for told in ("Strange", "MultiheadAttention", "LlamaAttention", "olmo_core.nn.attention.Attention", "layouts="):
        assert told in str(caught.value)


def doubled_queries(model: nn.Module) -> None:
    """As in Qwen3-Next, where every query head has a gate beside it."""
    model.layers[1].q_proj = nn.Linear(24, 48)


def without_keys(model: nn.Module) -> None:
    del model.layers[1].k_proj


def one_projection_for_two(model: nn.Module) -> None:
    model.layers[1].v_proj = model.layers[0].v_proj


def quantised(model: nn.Module) -> None:
    weight = model.layers[1].v_proj.weight.to(torch.int8)
    model.layers[1].v_proj.weight = nn.Parameter(weight, requires_grad=False)


@pytest.mark.parametrize(
    "spoil, told",
    [
        (doubled_queries, "q_proj has 48 numbers in heads of 6, not 4 heads"),
        (without_keys, "has no attribute 'k_proj'"),
        (one_projection_for_two, "layers.1 and layers.0 share one module as v_proj"),
        (quantised, "int8"),
    ],
)
def test_a_model_that_is_not_as_expected_is_refused_and_left_as_it_was(spoil, told: str, tiny) -> None:
    model = tiny()
    spoil(model)
    before = list(model.state_dict())
    with pytest.raises(HeadsError, match=told):
        insert(model, "kha_mlp", layouts=LAYOUTS)
    assert list(model.state_dict()) == before and not model.layers[0].v_proj._forward_hooks


def test_a_second_insertion_is_refused(tiny) -> None:
    with pytest.raises(HeadsError, match=r"layers\.0\.kha is already inserted"):
        insert(tiny("kha_mlp"), "kha_linear", layouts=LAYOUTS)


@pytest.mark.parametrize(
    "interaction, options, told",
    [
        ("mlp", {}, "'mlp': one of kha_linear, kha_mlp, kha_gate, mea, gated"),
        ("gated", {"output_gate": "none"}, "headwise or elementwise"),
        ("kha_mlp", {"output_gate": "both"}, "none, headwise, elementwise"),
        ("kha_mlp", {"where": ("v",)}, "no option 'where': output_gate, projections, share"),
        ("kha_mlp", {"projections": ()}, "a choice of q, k, v"),
        ("kha_mlp", {"projections": ("v", "v")}, "each once"),
        ("kha_mlp", {"projections": "v"}, "a choice of q, k, v"),
        ("kha_linear", {"share": "all"}, "heads or none"),
        ("mea", {"compose": ("q",)}, "a choice of k, v"),
        ("mea", {"compose": (), "head_norm": False}, "a choice of k, v"),
        ("mea", {"head_norm": 1}, "true or false"),
        ("kha_mlp", {"layouts": {"TinyAttention": "mine"}}, "layout 'mine': one of transformers"),
    ],
)
def test_a_wrong_option_is_told_with_what_is_allowed(
    interaction: str, options: dict[str, Any], told: str, tiny
) -> None:
    with pytest.raises(HeadsError, match=told):
        insert(tiny(), interaction, **{"layouts": LAYOUTS, **options})


@pytest.mark.slow
@pytest.mark.parametrize("interaction", ["kha_mlp", "mea", "gated"])
def test_a_model_is_compiled_without_a_graph_break(interaction: str, tiny, moved, x_BTD) -> None:
    def gradients(model: nn.Module, run: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        out = run(x_BTD)
        out.square().sum().backward()
        return [out, *(parameter.grad for parameter in model.parameters())]

    plain, model = moved(tiny(interaction)), moved(tiny(interaction))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradients(model, compiled), gradients(plain, plain), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_compiled_model_is_refused_because_its_program_would_not_change(tiny) -> None:
    model = tiny()
    model.layers[1].compile()
    for one, told in ((model, r"layers\.1 is compiled"), (torch.compile(tiny()), "the model is compiled")):
        with pytest.raises(HeadsError, match=told):
            insert(one, "kha_mlp", layouts=LAYOUTS)
