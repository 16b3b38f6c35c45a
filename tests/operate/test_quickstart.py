"""The quickstart, shortened: every stage really runs, and a second call repeats none of them."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest

import kha_train.operate.quickstart as stages
from data_tools.corpus import build_corpus
from data_tools.train_tokenizer import train_tokenizer
from kha_train.config.compose import compose
from kha_train.data.format.shards import ShardSet
from kha_train.errors import ConfigError, DataError
from kha_train.operate import datasets
from kha_train.operate.quickstart import VARIANTS, run_quickstart
from kha_train.record import read_metrics, read_run
from kha_train.train.run import train

PACKAGES = [Path(sysconfig.get_paths()["stdlib"]) / name for name in ("asyncio", "email", "json", "unittest")]


def test_every_stage_makes_its_result_and_a_second_call_makes_none_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With less text, and trained in this process instead of by `kha train --ranks`."""
    begun: list[str] = []

    def corpus(out: Path, overwrite: bool) -> None:
        begun.append("corpus")
        build_corpus(out, standard_library=False, extra_roots=PACKAGES, overwrite=overwrite)

    monkeypatch.setattr(datasets, "build_corpus", corpus)
    monkeypatch.setattr(stages, "_train", lambda run_dir, overrides, processes: train(compose(overrides)))
    result = run_quickstart(tmp_path, steps=1, processes=1, say=lambda text: None)
    assert set(result["bits_per_byte"]) == set(VARIANTS) and Path(result["report"]).read_text().startswith("<!")
    runs = [tmp_path / "runs" / f"{variant}-1" for variant in VARIANTS]
    first, second = (read_metrics(run) for run in runs)
    assert first[0]["samples_last"] == second[0]["samples_last"] and first[0]["train/loss"] == second[0]["train/loss"]

    made = [tmp_path / "tokenizer.model", *tmp_path.glob("shards/*/*"), *(run / "metrics.jsonl" for run in runs)]
    times = [path.stat().st_mtime_ns for path in made]
    again = run_quickstart(tmp_path, steps=1, processes=1, say=lambda text: None)
    assert begun == ["corpus"] and times == [path.stat().st_mtime_ns for path in made]
    assert again["bits_per_byte"] == result["bits_per_byte"]


def test_a_tokenizer_of_ones_own_is_used_and_sets_the_vocabulary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "corpus").mkdir()
    for split in ("train", "validation"):
        (tmp_path / "corpus" / f"{split}.jsonl").write_text('{"text": "some words of a text "}\n' * 900)
    (tmp_path / "corpus" / "corpus.json").write_text("{}")
    own = train_tokenizer(tmp_path / "corpus", tmp_path / "own" / "tokenizer.json", vocab_size=280)
    monkeypatch.setattr(stages, "_train", lambda run_dir, overrides, processes: trained.append(overrides))
    trained: list[list[str]] = []
    with pytest.raises(ConfigError):  # nothing was trained, so there is nothing to compare
        run_quickstart(tmp_path, steps=1, processes=1, say=lambda text: None, tokenizer=own.path)
    assert [overrides[-1] for overrides in trained] == ["model.vocab_size=280"] * len(VARIANTS)
    assert ShardSet.open(tmp_path / "shards" / "train").check_tokenizer().name == "tokenizer.json"
    assert not (tmp_path / "tokenizer.model").exists()


@pytest.mark.slow
def test_quickstart_trains_both_models_on_the_same_data_and_compares_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    out = tmp_path / "with space"
    said: list[str] = []
    result = run_quickstart(out, steps=12, processes=2, say=said.append)

    assert set(result["bits_per_byte"]) == set(VARIANTS)
    assert all(0 < bits < 8 for bits in result["bits_per_byte"].values())
    assert 0 < result["unigram_bits_per_byte"] < 8
    assert len(result["seconds"]) == 6
    assert "not evidence" in result["evidence"]
    assert Path(result["report"]).read_text().startswith("<!")
    closing = "\n".join(said)
    assert result["report"] in closing and "next:" in closing

    first, second = (read_metrics(out / "runs" / f"{variant}-12") for variant in VARIANTS)
    assert [line["samples_last"] for line in first] == [line["samples_last"] for line in second]
    assert read_run(out / "runs" / "gqa-12")["attempts"][0]["world_size"] == 2

    again = run_quickstart(out, steps=12, processes=2, say=said.append)
    assert again["bits_per_byte"] == result["bits_per_byte"]
    assert read_metrics(out / "runs" / "gqa-12") == first

    (out / "shards" / "train" / "manifest.json").write_text("{}")
    with pytest.raises(DataError):
        run_quickstart(out, steps=3, processes=1, say=said.append)
