"""A small decoder in plain torch whose attention is laid out as in transformers, for tests that need no library."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from kha_train.heads import insert

# B batch   T tokens   D model width   H query heads   G key/value heads   K head width
D, H, G, K = 24, 4, 2, 6


class TinyAttention(nn.Module):
    """Causal grouped-query attention with biases."""

    def __init__(self) -> None:
        super().__init__()
        self.head_dim, self.num_key_value_groups = K, H // G
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(D, H * K), nn.Linear(D, G * K), nn.Linear(D, G * K)
        self.o_proj = nn.Linear(H * K, D)

    def forward(self, x_BTD: Tensor) -> Tensor:
        q, k, v = (
            projection(x_BTD).unflatten(-1, (-1, K)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).flatten(-2))


class Tiny(nn.Module):
    """Two layers of it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TinyAttention() for _ in range(2))

    def forward(self, x_BTD: Tensor) -> Tensor:
        for layer in self.layers:
            x_BTD = x_BTD + layer(functional.rms_norm(x_BTD, (D,)))
        return x_BTD


@pytest.fixture
def tiny() -> Callable[..., nn.Module]:
    """`tiny(interaction, **options)`: the decoder with fixed random weights and, if named, that interaction."""

    def build(interaction: str | None = None, **options: object) -> nn.Module:
        torch.manual_seed(0)
        model = Tiny()
        layouts = {"TinyAttention": "transformers"}
        return model if interaction is None else insert(model, interaction, layouts=layouts, **options)

    return build


@pytest.fixture(scope="session")
def moved() -> Callable[[nn.Module], nn.Module]:
    """Gives the inserted parameters of a model values as training might, in place."""

    def move(model: nn.Module) -> nn.Module:
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".kha." in name:
                    parameter += 0.3 * torch.randn(parameter.shape, generator=generator).to(parameter)
        return model

    return move


@pytest.fixture(scope="session")
def x_BTD() -> Tensor:
    return torch.randn(2, 7, D, generator=torch.Generator().manual_seed(1))
