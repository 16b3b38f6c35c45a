"""The benchmark of interactions measures what it names."""

import json

import pytest
import torch
from typer.testing import CliRunner

from kha_train.bench import attention as bench
from kha_train.bench.attention import VARIANTS
from kha_train.cli.main import app
from kha_train.config.compose import compose
from kha_train.config.resolve import Device, implementation
from kha_train.errors import ConfigError


def test_every_variant_runs_as_named_and_is_told_with_the_protocol():
    for name, overrides in VARIANTS.items():
        assert implementation(compose(overrides)).name == ("folded" if name.endswith("folded") else "eager")
    shape = ["engine.device=cpu", "model.hidden_size=32", "model.head_dim=8", "model.seq_len=16"]
    answer = CliRunner().invoke(app, ["bench", "attention", *shape, "--blocks", "3", "--json"])
    assert answer.exit_code == 0, answer.output
    found = json.loads(answer.stdout)
    assert found["seconds"].keys() == VARIANTS.keys() and found["blocks"] == 3 and found["hidden_size"] == 32
    assert found["against_gqa"]["gqa"] == {"ratio": 1.0, "low": 1.0, "high": 1.0}
    assert all(variant["seconds"] > 0 for variant in found["seconds"].values())


def test_kernels_are_measured_where_they_run_and_nowhere_else(monkeypatch):
    config = compose(["model.head_dim=64"])
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert bench.variants_for(config, torch.device("cpu"), "fp32") == VARIANTS
    monkeypatch.setattr(bench, "device_facts", lambda device: Device("cuda", (9, 0)))
    cuda = torch.device("cuda")
    assert bench.variants_for(config, cuda, "bf16") == VARIANTS | bench.ON_KERNELS
    assert bench.variants_for(compose(["model.head_dim=24"]), cuda, "bf16") == VARIANTS
    ways = {name: implementation(compose(["model.head_dim=64", *chosen])) for name, chosen in bench.ON_KERNELS.items()}
    assert [way.name for way in ways.values()] == ["eager", "triton", "triton"]


def test_what_a_run_could_not_begin_with_is_refused_experts_included(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="megablocks cannot be used here") as refused:
        bench.measure(["model=tiny", "moe.backend=megablocks"], blocks=1)
    assert refused.value.field == "moe.backend"
