"""`kha compress`: the run it writes has the compressed function, generates, trains on; the old run is untouched."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from kha_train.cli.main import build
from kha_train.config.compose import compose, load
from kha_train.decode.absorb import absorb, absorbed_config
from kha_train.decode.generate import materialise
from kha_train.decode.virtual_heads import compress
from kha_train.errors import CheckpointError, ConfigError
from kha_train.export.compress import compress_run, layers_named, open_source
from kha_train.export.compress_scan import _limited, scan
from kha_train.export.heads_files import insertion_of
from kha_train.record import read_metrics
from kha_train.train.run import train
from kha_train.variants.task import ContextOptions

CPU = torch.device("cpu")


@contextmanager
def no_bar(what: str, total: int) -> Iterator[Any]:
    """Counts what is done: all of it, at the end."""
    done: list[int] = []
    yield done.append
    assert sum(done) == total


@pytest.fixture(scope="module")
def run(small: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run of MEA with its norm: two layers of four key/value heads."""
    directory = tmp_path_factory.mktemp("compress") / "run"
    settings = ["attention=mea", "model.query_heads=4", "model.kv_heads=4", "model.head_dim=16", "run.steps=2"]
    train(compose([*small, *settings, "engine.name=plain", "optim.lr=1e-2", f"run.dir={directory}"]))
    return directory


def digest(directory: Path) -> dict[str, str]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def logits(path: Path) -> torch.Tensor:
    config, checkpoint = open_source(path)
    with torch.no_grad():
        found = materialise(config, checkpoint, CPU)(torch.arange(24).view(2, 12)).logits_BTV
    assert found is not None
    return found


def test_the_new_run_has_the_function_of_the_compressed_decoder_and_generates(run: Path, tmp_path: Path) -> None:
    before, out = digest(run), tmp_path / "half"
    made = compress_run(run, "1", 2, out, no_bar)
    assert digest(run) == before
    assert made.heads_by_layer == (0, 2) and made.cache_numbers == (256, 192)
    assert [(loss.layer, loss.projection) for loss in made.losses] == [(1, "k"), (1, "v")]
    config, checkpoint = open_source(run)
    assert made.step == checkpoint.step == 2
    with torch.no_grad():
        whole = materialise(config, checkpoint, CPU)
        expected = compress(whole, (0, 2))(torch.arange(24).view(2, 12)).logits_BTV
    torch.testing.assert_close(logits(out), expected, rtol=1e-5, atol=1e-6)
    assert (logits(out) - logits(run)).abs().max() > 1e-4
    arguments = ["generate", str(out), "--ids", "1,2,3", "--tokens", "4", "--temperature", "0", "--json"]
    answer = CliRunner().invoke(build(["generate"]), arguments)
    assert answer.exit_code == 0 and len(json.loads(answer.stdout)["ids"][0]) == 4
    # Its settings, added to those of the old run, make its model.
    again = compose([*map(str, made.settings), "model.layers=2", "model.kv_heads=4"]).attention.interaction
    assert again == load(out / "config.yaml").attention.interaction


def test_at_full_rank_the_new_run_computes_what_the_old_one_does(run: Path, tmp_path: Path) -> None:
    # A checkpoint that was moved out of its run is enough.
    shutil.copytree(run / "checkpoints" / "step-00000002", tmp_path / "step-00000002")
    compress_run(tmp_path / "step-00000002", "all", 4, tmp_path / "same", no_bar)
    torch.testing.assert_close(logits(tmp_path / "same"), logits(run), rtol=1e-5, atol=1e-6)


def test_what_is_there_stays_and_what_failed_is_removed(run: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("mine")
    with pytest.raises(ConfigError, match="nothing is overwritten"):
        compress_run(run, "all", 1, tmp_path / "mine", no_bar)
    for layers, heads in (("all", 5), ("all", 0), ("7", 1), ("deep", 1)):
        with pytest.raises(ConfigError):
            compress_run(run, layers, heads, tmp_path / "none", no_bar)
    (damaged := next((run / "checkpoints").rglob("model-*.safetensors"))).rename(tmp_path / "aside")
    try:
        with pytest.raises(CheckpointError):
            compress_run(run, "all", 1, tmp_path / "none", no_bar)
    finally:
        (tmp_path / "aside").rename(damaged)
    assert digest(tmp_path) == {"mine/notes": hashlib.sha256(b"mine").hexdigest()} and not (tmp_path / "none").exists()


def test_a_scan_scores_each_layer_and_each_group_as_the_compressed_decoders_are(run: Path) -> None:
    found = scan(run, (4, 1), 4, no_bar)
    assert [(point.layers, point.kv_heads) for point in found.points] == [
        (layers, heads) for heads in (4, 1) for layers in ("0", "1", "all")
    ]
    for point in found.points[:3]:
        assert max(map(abs, found.rises(point).values())) < 1e-4 and point.cache_numbers == 256
    assert {"validation/loss", "validation/bits_per_byte", "evaluation/repeats/loss_at_16"} <= found.whole.scores.keys()
    assert [point.cache_numbers for point in found.points[3:]] == [160, 160, 64]
    # The record of the run has the validation loss of the whole model, over twice the rows.
    twice = scan(run, (1,), 8, no_bar)
    assert twice.whole.scores["validation/loss"] == pytest.approx(read_metrics(run)[-1]["validation/loss"], rel=1e-5)
    assert json.loads(json.dumps(found.to_plain()))["points"][0]["rise"].keys() == found.whole.scores.keys()


def test_a_task_of_a_scan_scores_as_many_rows_as_asked_and_no_more() -> None:
    context = ContextOptions(name="context")
    limited = [_limited(replace(context, rows=rows), 64) for rows in (0, 8, 4096)]
    assert [task.rows for task in limited if isinstance(task, ContextOptions)] == [64, 8, 64]


@pytest.mark.slow
def test_training_goes_on_with_the_compressed_weights_under_zero_3(run: Path, small: list[str], tmp_path: Path) -> None:
    made = compress_run(run, "0", 1, tmp_path / "less", no_bar)
    shape = ["attention=mea", "model.query_heads=4", "model.kv_heads=4", "model.head_dim=16", "engine=zero3"]
    settings = [*small, *shape, *made.settings, f"run.init_from={tmp_path / 'less'}", f"run.dir={tmp_path / 'on'}"]
    train(compose([*settings, "run.steps=2", "optim.lr=1e-9", "optim.weight_decay=0", "moe.bias_update_rate=0"]))
    torch.testing.assert_close(logits(tmp_path / "on"), logits(tmp_path / "less"), rtol=1e-4, atol=1e-5)
    shapes = open_source(tmp_path / "on")[1].names()
    assert shapes["blocks.0.attention.key.weight"] == (16, 64) and shapes["blocks.1.attention.key.weight"] == (64, 64)


@pytest.mark.parametrize(
    ("text", "layers", "named"),
    [
        ("all", 3, (0, 1, 2)),
        ("middle", 4, (1, 2)),
        ("middle", 5, (1, 2)),
        ("middle", 48, tuple(range(12, 36))),
        ("deep", 48, tuple(range(3, 48))),
        ("deep", 4, (3,)),
        ("2,0", 3, (0, 2)),
        ("0,2-3", 4, (0, 2, 3)),
    ],
)
def test_words_and_lists_name_layers(text: str, layers: int, named: tuple[int, ...]) -> None:
    assert layers_named(text, layers) == named


@pytest.mark.parametrize("text", ["", "half", "4", "1-", "3-2", "0,,1", "-1", "deep", "0-99999999"])
def test_words_that_name_no_layer_are_refused(text: str) -> None:
    with pytest.raises(ConfigError) as refused:
        layers_named(text, 3)
    assert refused.value.field == "--layers"


def test_absorbed_weights_are_those_that_are_factored(run: Path) -> None:
    config, checkpoint = open_source(run)
    plain = absorb(materialise(config, checkpoint, CPU))
    with torch.no_grad():
        found = compress(plain, (4, 4)).blocks[1].attention
        weight = found.interaction.compose["v"].weight.T @ found.value.weight.view(4, -1)
    torch.testing.assert_close(weight, plain.blocks[1].attention.value.weight.view(4, -1), rtol=1e-5, atol=1e-6)


def test_a_compressed_model_is_exported_absorbed_alone(run: Path, tmp_path: Path) -> None:
    """Stock classes have as many heads in every layer, and no composition."""
    compress_run(run, "1", 2, tmp_path / "half", no_bar)
    config = open_source(tmp_path / "half")[0]
    with pytest.raises(ConfigError, match="another number of components"):
        insertion_of(config)
    absorbed = absorbed_config(config)
    assert absorbed is not None and absorbed.attention.base.heads().kv_heads == 4 and insertion_of(absorbed) is not None
