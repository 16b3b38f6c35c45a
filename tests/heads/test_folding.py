"""A linear interaction folds into the weights of the stock model; whatever cannot be folded is refused whole."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from kha_train.heads import HeadsError, fold

LINEAR: list[tuple[str, dict[str, Any]]] = [
    ("kha_linear", {}),
    ("kha_linear", {"share": "none"}),
    ("mea", {"head_norm": False}),
]


@pytest.mark.parametrize("interaction, options", LINEAR)
def test_a_folded_model_is_the_stock_model_with_other_weights(interaction, options, tiny, moved, x_BTD) -> None:
    stock, model = tiny().double(), moved(tiny(interaction, **options).double())
    x = x_BTD.double()
    expected = model(x)
    assert (expected - stock(x)).abs().max() > 0.1
    copied = copy.deepcopy(model)
    assert fold(model) is model
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    assert list(model.state_dict()) == list(stock.state_dict())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(copied(x), expected)
    torch.testing.assert_close(fold(copied)(x), expected, rtol=1e-12, atol=1e-12)


def test_a_fold_of_half_precision_rounds_once(tiny, moved) -> None:
    """Every weight is that of the product in fp64, rounded to bf16."""
    model = moved(tiny("kha_linear").bfloat16())
    exact = fold(copy.deepcopy(model).double())
    for name, weight in fold(model).state_dict().items():
        assert torch.equal(weight, exact.state_dict()[name].bfloat16()), name


@pytest.mark.parametrize("interaction, told", [("kha_mlp", "Perceptron"), ("kha_gate", "Gate"), ("mea", "Norm")])
def test_what_is_not_linear_is_not_folded(interaction: str, told: str, tiny, moved, x_BTD) -> None:
    model = moved(tiny(interaction))
    before = model(x_BTD)
    with pytest.raises(HeadsError, match=rf"{interaction} of layers\.0 \({told}\) is not linear"):
        fold(model)
    assert torch.equal(model(x_BTD), before)


def test_an_output_gate_is_not_folded(tiny, moved, x_BTD) -> None:
    model = moved(tiny("kha_linear", output_gate="headwise"))
    before = model(x_BTD)
    with pytest.raises(HeadsError, match=r"output gate of layers\.0 reads activations"):
        fold(model)
    assert torch.equal(model(x_BTD), before)


def test_a_stock_model_has_nothing_to_fold(tiny) -> None:
    with pytest.raises(HeadsError, match="nothing is inserted into Tiny"):
        fold(tiny())


def tied(model: nn.Module) -> None:
    model.layers[1].k_proj.weight = model.layers[0].k_proj.weight


def on_meta(model: nn.Module) -> None:
    model.layers[1].k_proj.to("meta")


def sharded(model: nn.Module) -> None:
    model.layers[1].k_proj.weight.data = torch.empty(0)


def a_share(model: nn.Module) -> None:
    model.layers[1].k_proj.weight.data = model.layers[1].k_proj.weight.data[:6]


def adapted(model: nn.Module) -> None:
    model.layers[1].k_proj.adapter = nn.Linear(2, 2)


def parametrised(model: nn.Module) -> None:
    parametrize.register_parametrization(model.layers[1].k_proj, "weight", nn.Identity())


def heads_sharded(model: nn.Module) -> None:
    model.layers[1].kha.k.map.data = torch.empty(0)


@pytest.mark.parametrize("spoil", [tied, on_meta, sharded, a_share, adapted, parametrised, heads_sharded])
def test_a_weight_that_cannot_be_changed_alone_is_refused_before_any_is_changed(spoil, tiny, moved) -> None:
    model = moved(tiny("kha_linear"))
    spoil(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(HeadsError, match=r"layers\.[01]\.(k_proj|kha)"):
        fold(model)
    after = model.state_dict()
    assert all(value.is_meta or torch.equal(after[name], value) for name, value in before.items())
