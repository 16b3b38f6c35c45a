"""`kha checkpoint merge`: exact averages, of what may be averaged, of checkpoints of one model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import kha_train.checkpoint.merge as merging
from kha_train.checkpoint.background import write
from kha_train.checkpoint.pieces import Piece
from kha_train.checkpoint.reader import Checkpoint, open_verified
from kha_train.cli.checkpoint import app
from kha_train.config.build import to_plain
from kha_train.config.compose import compose, load
from kha_train.decode.generate import materialise
from kha_train.distributed import World
from kha_train.engine.building import persistent_buffers
from kha_train.errors import CheckpointError, ConfigError
from kha_train.model.decoder import lay_out_decoder
from kha_train.train.run import train

SMALL = ("model.layers=2", "model.hidden_size=32", "model.head_dim=8", "model.vocab_size=64", "model.seq_len=24")
STATEFUL = ("moe.routing_warmup_steps=10",)
"""With a router that counts its steps."""
ONE = torch.device("cpu")


def save(run: Path, step: int, *overrides: str, seed: int = 0) -> Path:
    """A checkpoint of random weights and buffers of a small model, with moments, as a run writes it."""
    config = compose([*SMALL, f"run.dir={run}", *overrides])
    decoder, generator = lay_out_decoder(config), torch.Generator().manual_seed(100 * seed + step)
    pieces = []
    for name, parameter in decoder.named_parameters():
        values = torch.randn(parameter.numel(), generator=generator)
        pieces += [Piece(name, "master", tuple(parameter.shape), 0, values)]
        pieces += [Piece(name, kind, tuple(parameter.shape), 0, values**2) for kind in ("exp_avg", "exp_avg_sq")]
    buffers = {name: torch.rand(one.shape, generator=generator) for name, one in persistent_buffers(decoder).items()}
    write(run, step, World.single(), pieces, buffers, {"config": to_plain(config)})
    return run / "checkpoints" / f"step-{step:08d}"


def kha(*words: object) -> dict:
    """What `kha checkpoint merge --json` says. Raises as it does."""
    result = CliRunner().invoke(app, ["merge", *map(str, words), "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of steps 2, 4 and 6."""
    directory = tmp_path_factory.mktemp("run") / "run"
    for step in (2, 4, 6):
        save(directory, step, *STATEFUL)
    return directory


def opened(run: Path) -> Checkpoint:
    return open_verified(run, World.single())


@pytest.mark.parametrize(("weights", "shares"), [("", [1 / 3] * 3), ("1,0,3", [0.25, 0.0, 0.75])])
def test_weights_are_the_mean_in_fp64_rounded_once(
    weights: str, shares: list[float], run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the size of the parts that are read at a time; what a router counted is that of the last."""
    monkeypatch.setattr(merging, "PIECE_ELEMENTS", 300)
    told = kha(run, "--last", 3, "--out", tmp_path / "out", *(["--weights", weights] if weights else []))
    assert [source["step"] for source in told["sources"]] == [2, 4, 6] and told["weights"] == shares
    made = opened(tmp_path / "out")
    each = [opened(Path(source["checkpoint"])) for source in told["sources"]]
    assert made.kinds == ("master",) and made.names() == each[0].names()
    for name in made.names():
        values = np.stack([one.read(name, "master").numpy().astype(np.float64) for one in each])
        expected = sum(share * one for share, one in zip(shares, values, strict=True)).astype(np.float32)
        assert np.array_equal(made.read(name, "master").numpy(), expected)
    every, kept = [one.buffers() for one in each], set(told["taken_from_the_last"])
    assert {name.rpartition(".")[2] for name in every[0].keys() - kept} == {"selection_bias"} and kept
    for name, found in made.buffers().items():
        mean = sum(share * one[name].double() for share, one in zip(shares, every, strict=True)).float()
        assert torch.equal(found, every[-1][name] if name in kept else mean)


def test_the_average_of_equal_checkpoints_is_that_checkpoint_bit_for_bit(run: Path, tmp_path: Path) -> None:
    step = run / "checkpoints" / "step-00000004"
    kha(step, step, step, "--out", tmp_path / "out", "--weights", "0.3,0.3,0.1")
    made, same = opened(tmp_path / "out"), opened(step)
    assert all(torch.equal(made.read(name, "master"), same.read(name, "master")) for name in same.names())
    assert all(torch.equal(buffer, same.buffers()[name]) for name, buffer in made.buffers().items())


def test_a_merged_run_is_a_run_of_the_model_and_says_what_it_is_made_of(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    told = kha(run, save(tmp_path / "other", 8, *STATEFUL, "optim.lr=1e-2", "moe.backend=loop", seed=1), "--out", out)
    config = load(out / "config.yaml")
    assert config.run.dir == str(out) and config.moe.backend == "loop"
    assert json.loads((out / "merged.json").read_text()) == told
    decoder = materialise(config, opened(out), ONE)
    expected = (
        sum(materialise(config, opened(Path(one["checkpoint"])), ONE).embedding.weight for one in told["sources"]) / 2
    )
    assert torch.allclose(decoder.embedding.weight, expected, atol=1e-6)


def test_checkpoints_of_different_models_are_not_averaged(run: Path, tmp_path: Path) -> None:
    for number, (setting, found) in enumerate(
        {"model.hidden_size=64": "setting model.hidden_size", "moe.top_k=3": "setting moe.top_k"}.items()
    ):
        other = save(tmp_path / f"other-{number}", 4, *STATEFUL, setting)
        with pytest.raises(ConfigError, match=f"different models: the {found} is"):
            kha(run, other, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "field"),
    [
        (("--weights", "1,2"), "--weights"),
        (("--weights", "0,0,0"), "--weights"),
        (("--weights", "1,-1,1"), "--weights"),
        (("--weights", "1,nan,1"), "--weights"),
        (("--weights", "a,b,c"), "--weights"),
        (("--last", 4), "--last"),
        (("--last", 1), "SOURCE"),
    ],
)
def test_options_that_give_no_average_name_their_field(words: tuple, field: str, run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        kha(run, "--last", 3, *words, "--out", tmp_path / "out")
    assert refused.value.field == field and not (tmp_path / "out").exists()


def test_nothing_is_overwritten_and_a_failed_average_leaves_nothing(run: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    with pytest.raises(ConfigError, match="nothing is overwritten"):
        kha(run, "--last", 2, "--out", tmp_path / "mine")
    pieces = [
        Piece("w", kind, (2,), 0, torch.tensor([1.0, float("inf")])) for kind in ("master", "exp_avg", "exp_avg_sq")
    ]
    for step in (1, 2):
        write(tmp_path / "bad", step, World.single(), pieces, {}, {"config": to_plain(compose([*SMALL]))})
    with pytest.raises(CheckpointError, match="not finite"):
        kha(tmp_path / "bad", "--last", 2, "--out", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad", "mine"]


@pytest.mark.slow
def test_a_run_goes_on_with_averaged_weights(
    small: list[str], tmp_path: Path, clean_environment: dict[str, str]
) -> None:
    first, out = tmp_path / "first", tmp_path / "out"
    train(compose([*small, f"run.dir={first}", "run.steps=2", "checkpoint.every_steps=1"]))
    kha(first, "--last", 2, "--out", out)
    train(compose([*small, f"run.dir={tmp_path / 'next'}", f"run.init_from={out}", "run.steps=1", "optim.lr=1e-9"]))
    after, merged = opened(tmp_path / "next"), opened(out)
    for name in merged.names():
        torch.testing.assert_close(after.read(name, "master"), merged.read(name, "master"), atol=1e-6, rtol=0)
