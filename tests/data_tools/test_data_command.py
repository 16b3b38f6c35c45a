"""`kha data`: the whole way from text to a verified dataset, with output that a program can read."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kha_train.analysis.spikes_text import batch_texts
from kha_train.cli.data import app
from kha_train.config.build import to_plain
from kha_train.config.compose import compose, dump
from kha_train.data.format.shards import ShardSet
from kha_train.data.inspect import BORDER, digest
from kha_train.data.stream import open_stream
from kha_train.errors import ConfigError, DataError
from kha_train.record import Record

PNG = b"\x89PNG\r\n\x1a\n"


def kha(*arguments: object) -> dict:
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("command")
    source = root / "source"
    source.mkdir()
    for i in range(100):
        (source / f"{i}.txt").write_text(f"Text {i} [red] word" * 5)
    corpus = kha("corpus", "--out", root / "corpus", "--no-standard-library", "--extra-root", source)
    assert corpus["documents"] == 100
    tokenizer = kha("tokenizer", "--corpus", root / "corpus", "--out", root / "t.model", "--vocab-size", 300)
    assert tokenizer["vocab_size"] == 300
    written = kha("tokenize", "--corpus", root / "corpus", "--tokenizer", root / "t.model", "--out", root / "shards")
    assert written["train"]["documents"] + written["validation"]["documents"] == 100
    return root


def test_the_same_tokenizer_in_either_format_gives_the_same_shards(made: Path, tmp_path: Path) -> None:
    corpus, model, shards = made / "corpus", tmp_path / "tokenizer.json", tmp_path / "shards"
    told = kha("tokenizer", "--corpus", corpus, "--out", model, "--vocab-size", 300)
    assert told["special_ids"] == {"pad": 0, "bos": 1, "eos": 2, "unk": 3}
    written = kha("tokenize", "--corpus", corpus, "--tokenizer", model, "--out", shards)
    assert written["encoder"] == "tokenizers" and kha("verify", shards)
    for split in ("train", "validation"):
        one, other = (ShardSet.open(root / "shards" / split).manifest for root in (made, tmp_path))
        assert one.shards == other.shards and one.tokenizer.bytes_per_id == other.tokenizer.bytes_per_id
        assert (shards / split / "tokenizer.json").read_bytes() == model.read_bytes()
    shown = kha("inspect", shards, "--samples", 1)[str(shards / "train")]
    assert shown["tokenizer"].startswith("tokenizers, 300 ids") and "Text" in shown["samples"][0]["text"]


def test_a_document_ends_with_the_token_that_was_named_and_ids_may_be_fewer_than_the_models(
    made: Path, tmp_path: Path
) -> None:
    how = ("--corpus", made / "corpus", "--tokenizer", made / "t.model", "--eos", "<s>", "--vocab-size", 70_000)
    kha("tokenize", *how, "--out", tmp_path)
    dataset = ShardSet.open(tmp_path / "validation")
    entry = dataset.manifest.shards[0]
    assert dataset.read(0, entry.tokens - 1, 1).tolist() == [1] and dataset.manifest.dtype == "uint32"
    assert dataset.vocab_size == 70_000 and kha("verify", tmp_path)
    result = CliRunner().invoke(app, ["tokenize", *map(str, how[:4]), "--eos", "<no>", "--out", str(tmp_path / "x")])
    assert isinstance(result.exception, ConfigError) and result.exception.field == "eos"


def test_verify_reads_both_datasets(made: Path) -> None:
    answer = kha("verify", made / "shards")
    assert [entry["ok"] for entry in answer.values()] == [True, True]


def test_verify_of_a_url_sees_damage_that_came_after_its_blocks_were_cached(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    store = Path(shutil.copytree(made / "shards" / "train", tmp_path / "store"))
    ShardSet.open(f"file://{store}").token_counts()
    assert kha("verify", f"file://{store}")[f"file://{store}"]["ok"]
    tok = store / "shard-00000.tok"
    tok.write_bytes(bytes([tok.read_bytes()[0] ^ 1]) + tok.read_bytes()[1:])
    with pytest.raises(DataError, match="shard-00000.tok"):
        kha("verify", f"file://{store}")


def test_inspect_shows_statistics_and_text_with_document_borders(made: Path) -> None:
    answer = kha("inspect", made / "shards" / "train", "--samples", 1, "--tokens", 200)
    (entry,) = answer.values()
    text = "".join(f"Text {i} [red] word" * 5 + "‖" for i in (0, 1))
    assert entry["samples"][0]["text"].startswith(text)
    assert entry["bytes_per_token"] == round(entry["text_bytes"] / entry["tokens"], 3)
    plain = CliRunner().invoke(app, ["inspect", str(made / "shards")], catch_exceptions=False)
    assert "[red]" in plain.stdout and str(entry["tokens"]) in plain.stdout


@pytest.mark.parametrize("name", ["lengths.png", "lengths.of documents.PNG"])
def test_the_histograms_of_all_datasets_are_in_the_very_file_that_was_named(
    made: Path, tmp_path: Path, name: str
) -> None:
    heights = []
    for directory in (made / "shards" / "train", made / "shards"):
        answer = kha("inspect", directory, "--png", tmp_path / name, "--force")
        assert {entry["png"] for entry in answer.values()} == {str(tmp_path / name)}
        heights.append(int.from_bytes((tmp_path / name).read_bytes()[20:24]))
    assert [path.name for path in tmp_path.iterdir()] == [name] and heights[1] == 2 * heights[0]


def test_only_a_picture_of_the_same_datasets_is_drawn_over_unasked(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken, shards = tmp_path / "lengths.png", made / "shards"
    for _ in range(2):
        kha("inspect", shards, "--png", taken)
        monkeypatch.chdir(made)
        shards = Path("shards")
    ours = taken.read_bytes()
    mark = ours[ours.index(b"kha-inspect ") :][: len("kha-inspect ") + 64]
    for content, directory in (
        (b"somebody's", shards), (b"import kha_train  # " + mark, shards), (PNG + b"kha_train", shards),
        (ours, shards / "train"), (ours.replace(b"kha-inspect", b"kha-spikes "), shards),
    ):  # fmt: skip
        taken.write_bytes(content)
        with pytest.raises(ConfigError, match="was not made by this command"):
            kha("inspect", directory, "--png", taken)
        assert taken.read_bytes() == content
        kha("inspect", directory, "--png", taken, "--force")
        assert taken.read_bytes().startswith(PNG)


@pytest.mark.parametrize("name", ["mine.py", "lengths", "lengths.svg"])
def test_a_png_is_drawn_into_a_file_of_that_name_alone(made: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "mine.py").write_text("import kha_train  # my own script\n")
    with pytest.raises(ConfigError, match=r"ends in \.png"):
        kha("inspect", made / "shards", "--png", tmp_path / name, "--force")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.py"]
    assert (tmp_path / "mine.py").read_text() == "import kha_train  # my own script\n"


def test_a_dataset_may_be_named_by_a_url(made: Path) -> None:
    pytest.importorskip("fsspec")
    answer = kha("verify", f"file://{made}/shards/train")
    assert [entry["ok"] for entry in answer.values()] == [True]


def test_inspect_shows_a_step_that_jumped_a_skip_window(made: Path, tmp_path: Path) -> None:
    overrides = [f"data.train={made}/shards/train", f"data.validation={made}/shards/validation"]
    config = compose([*overrides, "model.vocab_size=300", "model.seq_len=32", "data.global_batch_size=4"])
    (tmp_path / "config.yaml").write_text(dump(config))
    (tmp_path / "run.json").write_text(json.dumps({"attempts": [{"attempt": 1, "world_size": 1}]}))
    lines = [{"step": 3, "attempt": 1, "samples_first": 8, "samples_last": 16}]
    lines.append({"step": 4, "attempt": 1, "samples_first": 17, "samples_last": 99})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    event = {"kind": "rewind", "step": 5, "window": [10, 15]}
    (tmp_path / "events.jsonl").write_text(json.dumps(event) + "\n")
    samples = kha("inspect", "--run", tmp_path, "--step", 3)["samples"]
    assert [sample["sample"] for sample in samples] == [8, 9, 15, 16]
    with pytest.raises(ConfigError, match="samples from there end at 20"):
        kha("inspect", "--run", tmp_path, "--step", 4)


def test_faults_leave_the_command_as_errors_with_their_exit_code(made: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        kha("verify", tmp_path / "nowhere")
    with pytest.raises(ConfigError):
        kha("tokenize", "--corpus", made / "corpus", "--tokenizer", made / "t.model", "--out", made / "shards")
    path = made / "shards" / "validation" / "shard-00000.tok"
    data = path.read_bytes()
    path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    with pytest.raises(DataError):
        kha("verify", made / "shards")
    path.write_bytes(data)


def test_inspect_shows_the_very_samples_of_a_step(made: Path, tmp_path: Path) -> None:
    overrides = [f"data.train={made}/shards/train", f"data.validation={made}/shards/validation"]
    config = compose([*overrides, "model.vocab_size=300", "model.seq_len=32", "data.global_batch_size=4"])
    (tmp_path / "config.yaml").write_text(dump(config))
    line = {"step": 3, "attempt": 1, "samples_first": 8, "samples_last": 11}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    (tmp_path / "run.json").write_text(json.dumps({"attempts": [{"attempt": 1, "world_size": 2}]}))
    everything = kha("inspect", "--run", tmp_path, "--step", 3)["samples"]
    assert [sample["sample"] for sample in everything] == [8, 9, 10, 11]
    assert kha("inspect", "--run", tmp_path, "--step", 3, "--rank", 1)["samples"] == everything[2:]
    batch = next(open_stream(config, samples_seen=8))
    for sample, tokens in zip(everything, batch.tokens_BT, strict=True):
        assert sample["sha256"] == hashlib.sha256(tokens.numpy().astype("<i8").tobytes()).hexdigest()
        assert "Text" in sample["text"] and sample["source"] == "train"


@pytest.mark.slow
def test_inspect_shows_a_step_as_its_own_start_read_it(made: Path, tmp_path: Path) -> None:
    """Not as the last one would; of its data the path that the last start with the same data named."""
    moved = tmp_path / "moved"
    moved.symlink_to(made / "shards" / "train")
    common = ["model.vocab_size=300", "model.seq_len=32", "data.global_batch_size=4"]
    common.append(f"data.validation={made}/shards/validation")
    content_id = ShardSet.open(made / "shards" / "train").content_id
    starts = [("gone", 5, content_id), ("elsewhere", 6, "00" * 32), (str(moved), 7, content_id)]
    run = tmp_path / "run"
    for path, seed, found in starts:
        record = Record.open(run)
        config = to_plain(compose([*common, f"data.train={path}", f"run.seed={seed}"]))
        record.begin_attempt(record.last_step, facts={"data_content_id": found}, config=config)
        step = record.last_step + 1
        record.step({"step": step, "samples_first": 4 * step, "samples_last": 4 * step + 3})
        record.close()
    for step, seed in ((1, 5), (3, 7)):
        found = kha("inspect", "--run", run, "--step", step)["samples"]
        config = compose([*common, f"data.train={moved}", f"run.seed={seed}"])
        batch = next(open_stream(config, samples_seen=4 * step))
        assert [sample["sha256"] for sample in found] == [digest(row) for row in batch.tokens_BT.numpy()]
        assert [text["sample"] for text in batch_texts(run, step, 4 * step)] == [sample["sample"] for sample in found]
        assert batch_texts(run, step, 4 * step)[0]["text"] == found[0]["text"].replace(BORDER, "")
    with pytest.raises(ConfigError, match="elsewhere"):
        kha("inspect", "--run", run, "--step", 2)
