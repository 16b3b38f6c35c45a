"""A stock model with heads of `kha_heads` is imported with its interaction."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kha_train.checkpoint.reader import find_newest
from kha_train.config.compose import load
from kha_train.decode.generate import materialise
from kha_train.distributed import World
from kha_train.errors import ConfigError
from kha_train.export.importing import prepare
from kha_train.heads import insert, save

pytestmark = pytest.mark.slow

TOKENS = torch.randint(0, 256, (2, 48), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(
    ("kind", "name", "options"),
    [
        ("qwen3_moe", "kha_mlp", {}),
        ("glm4_moe", "kha_mlp", {"projections": ("k", "v"), "share": "none"}),
        ("olmoe", "kha_gate", {}),
        ("llama", "mea", {}),
        ("qwen3", "mea", {"compose": ("v",), "head_norm": False}),
        ("llama", "kha_linear", {}),
        ("glm4_moe", "gated", {"output_gate": "headwise"}),
        ("qwen3", "kha_mlp", {"output_gate": "elementwise"}),
    ],
)
def test_a_model_with_heads_is_imported_with_its_interaction(
    kind: str, name: str, options: dict[str, Any], save_model: Callable[..., Any], tmp_path: Path
) -> None:
    model = insert(save_model(kind, tmp_path / "stock"), name, **options)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for full, parameter in model.named_parameters():
            if ".kha." in full:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    save(model, tmp_path / "stock")
    run = tmp_path / "run"
    imported = prepare(tmp_path / "stock", run).write(run)
    assert any(text.startswith("interaction@attention.interaction=") for text in imported.settings)
    checkpoint = find_newest(run, World.single(), print)
    decoder = materialise(load(run / "config.yaml"), checkpoint, torch.device("cpu")).eval()
    with torch.no_grad():
        torch.testing.assert_close(decoder(TOKENS).logits_BTV, model(TOKENS).logits, rtol=1e-5, atol=1e-5)
    with pytest.raises(ConfigError):
        prepare(tmp_path / "stock", run, ["attention=kha_gate", "attention.interaction.projections=[q]"])
