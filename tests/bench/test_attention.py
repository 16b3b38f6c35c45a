"""The benchmark of interactions measures what it names."""

import json

from typer.testing import CliRunner

from kha_train.bench.attention import VARIANTS
from kha_train.cli.main import app
from kha_train.config.compose import compose
from kha_train.model.attention.interaction import implementation


def test_every_variant_runs_as_named_and_is_told_with_the_protocol():
    for name, overrides in VARIANTS.items():
        assert implementation(compose(overrides)) == ("folded" if name.endswith("folded") else "eager")
    shape = ["engine.device=cpu", "model.hidden_size=32", "model.head_dim=8", "model.seq_len=16"]
    answer = CliRunner().invoke(app, ["bench", "attention", *shape, "--rounds", "3", "--json"])
    assert answer.exit_code == 0, answer.output
    found = json.loads(answer.stdout)
    assert found["variants"].keys() == VARIANTS.keys() and found["rounds"] == 3 and found["hidden_size"] == 32
    assert found["variants"]["gqa"]["ratio"] == 1.0
    assert all(variant["seconds"] > 0 for variant in found["variants"].values())
