"""Local copies of public collections become shards by one command; here made-up files in the layout of each."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet
from typer.testing import CliRunner

from data_tools.corpus import SPLITS
from data_tools.recipes import articles
from data_tools.train_tokenizer import train_tokenizer
from kha_train.cli.data import app
from kha_train.data.format.shards import ShardSet
from kha_train.data.tokenizer_kinds import dataset_tokenizer
from kha_train.errors import ConfigError, DataError, KhaError

PAGE = [" = Valkyria = \n", " \n", " = = Story = = \n", " \n", " A text @-@ of one page . \n"]
OTHER = [" = X = \n", " \n", " Another page . \n"]


def lines(*rows: dict) -> bytes:
    """JSON lines."""
    return "".join(f"{json.dumps(row)}\n" for row in rows).encode()


def zst(data: bytes) -> bytes:
    """Compressed as the collections are."""
    return pyarrow.compress(data, codec="zstd", asbytes=True)


def table(path: Path, **columns: list) -> None:
    """A Parquet file."""
    parquet.write_table(pyarrow.table(columns), path)


def c4(root: Path) -> None:
    row = {"timestamp": "2019-04-25T12:57:54Z", "url": "https://a"}
    for name, texts in (
        ("train.00000-of-00002", "ab"),
        ("train.00001-of-00002", "c"),
        ("validation.00000-of-00001", "vd"),
    ):
        (root / f"c4-{name}.json.gz").write_bytes(gzip.compress(lines(*({"text": text, **row} for text in texts))))


def pile(root: Path) -> None:
    (root / "train").mkdir()
    row = {"meta": {"pile_set_name": "Pile-CC"}}
    (root / "train" / "00.jsonl.zst").write_bytes(zst(lines({"text": "a", **row}, {"text": "b", **row})))
    (root / "train" / "01.jsonl.zst").write_bytes(zst(lines({"text": "c", **row})))
    (root / "val.jsonl.zst").write_bytes(zst(lines({"text": "v", **row}, {"text": "d", **row})))
    (root / "test.jsonl.zst").write_bytes(zst(lines({"text": "t", **row})))


def fineweb(root: Path) -> None:
    for number, dump in enumerate(("CC-MAIN-2013-20", "CC-MAIN-2024-10")):
        (root / "data" / dump).mkdir(parents=True)
        texts = [f"{number} {i}" for i in range(20)]
        table(root / "data" / dump / "000_00000.parquet", text=texts, id=texts, token_count=[1] * 20)
    (root / "README.md").write_text("a card")


def dclm(root: Path) -> None:
    for shard in range(2):
        folder = root / f"global-shard_0{shard + 1}_of_10" / "local-shard_0_of_10"
        folder.mkdir(parents=True)
        rows = ({"text": f"{shard} {i}", "metadata": {"WARC-Type": "response"}} for i in range(20))
        (folder / "shard_00000000_processed.jsonl.zst").write_bytes(zst(lines(*rows)))


def wikitext(root: Path) -> None:
    """The articles of a split go on from one file to the next, in rows of one line; empty lines are empty texts."""
    rows = [text if text.strip() else "" for text in [*PAGE, *OTHER]]
    table(root / "train-00000-of-00002.parquet", text=rows[:3])
    table(root / "train-00001-of-00002.parquet", text=rows[3:])
    table(root / "validation-00000-of-00001.parquet", text=rows[5:])
    table(root / "test-00000-of-00001.parquet", text=["t"])


def wikitext_raw(root: Path) -> None:
    (root / "wiki.train.raw").write_text("".join([" \n", *PAGE, *OTHER]))
    (root / "wiki.valid.raw").write_text("".join(OTHER))
    (root / "wiki.test.raw").write_text("t\n")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    (directory / "train.jsonl").write_bytes(lines(*({"text": text} for text in [*PAGE, *OTHER])))
    return train_tokenizer(directory, directory / "t.model", vocab_size=290).path


def tokenize(recipe: str, source: Path, model: Path, out: Path, *more: str) -> dict:
    """What the command says. Raises as it does."""
    how = ["tokenize", "--recipe", recipe, "--text", str(source), "--tokenizer", str(model), "--out", str(out)]
    result = CliRunner().invoke(app, [*how, *more, "--json"])
    if isinstance(result.exception, KhaError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def documents(out: Path) -> dict[str, list[str]]:
    """The text of every document, by split."""
    found = {}
    for split in SPLITS:
        shards = ShardSet.open(out / split)
        decode = dataset_tokenizer(shards).decode
        found[split] = []
        lengths = shards.document_lengths()
        for index, ends in enumerate(np.cumsum(one) for one in lengths):
            first = 0
            for end in ends.tolist():
                found[split].append(decode(shards.read(index, first, end - first)))
                first = end
    return found


WITH_SPLITS: dict[str, tuple[str, Callable[[Path], None], list[str], list[str]]] = {
    "c4": ("c4", c4, ["a", "b", "c"], ["v", "d"]),
    "pile": ("pile", pile, ["a", "b", "c"], ["v", "d"]),
    "wikitext": ("wikitext", wikitext, ["".join(PAGE[::2]), "".join(OTHER[::2])], ["".join(OTHER[::2])]),
    "wikitext, raw": ("wikitext", wikitext_raw, ["".join(PAGE[::2]), "".join(OTHER[::2])], ["".join(OTHER[::2])]),
}


@pytest.mark.parametrize("name", WITH_SPLITS)
def test_a_collection_with_a_validation_split_keeps_it_and_its_test_split_is_left_out(
    name: str, model: Path, tmp_path: Path
) -> None:
    recipe, make, train, validation = WITH_SPLITS[name]
    source = tmp_path / "en"
    source.mkdir()
    make(source)
    told = tokenize(recipe, source, model, tmp_path / "shards", "--shard-bytes", "20")
    assert documents(tmp_path / "shards") == {"train": train, "validation": validation}
    assert (recipe == "c4") != any("files beside the recipe left out" in note for note in told["notes"])
    corpus = ShardSet.open(tmp_path / "shards" / "train").manifest.corpus
    assert corpus["recipe"] == recipe and corpus["validation_percent"] is None


@pytest.mark.parametrize(("name", "make"), [("fineweb", fineweb), ("dclm", dclm)])
def test_a_collection_without_one_is_divided_by_the_hash_of_each_text(
    name: str, make: Callable[[Path], None], model: Path, tmp_path: Path
) -> None:
    make(tmp_path)
    tokenize(name, tmp_path, model, tmp_path / "shards", "--validation-percent", "20")
    found = documents(tmp_path / "shards")
    every = sorted(f"{number} {i}" for number in range(2) for i in range(20))
    assert sorted(found["train"] + found["validation"]) == every and 0 < len(found["validation"]) < 20


def test_a_text_of_both_splits_is_left_out_of_training(model: Path, tmp_path: Path) -> None:
    c4(tmp_path)
    (tmp_path / "c4-train.00002-of-00003.json.gz").write_bytes(gzip.compress(lines({"text": "v"}, {"text": "a"})))
    tokenize("c4", tmp_path, model, tmp_path / "shards", "--drop-repeated")
    assert documents(tmp_path / "shards") == {"train": ["a", "b", "c"], "validation": ["v", "d"]}


def test_variants_of_a_collection_that_overlap_are_not_mixed(model: Path, tmp_path: Path) -> None:
    for variant in ("en", "en.noblocklist"):
        (tmp_path / variant).mkdir()
        c4(tmp_path / variant)
    with pytest.raises(ConfigError, match="en.noblocklist.*several variants"):
        tokenize("c4", tmp_path, model, tmp_path / "shards")


def test_a_directory_of_another_layout_and_options_that_cannot_be_are_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines({"text": "a"}))
    with pytest.raises(ConfigError, match="no file of its layout for train"):
        tokenize("pile", tmp_path, model, tmp_path / "shards")
    with pytest.raises(ConfigError, match="unknown collection.*fineweb"):
        tokenize("webtext", tmp_path, model, tmp_path / "shards")
    with pytest.raises(ConfigError, match="says itself what is for validation"):
        tokenize("pile", tmp_path, model, tmp_path / "shards", "--validation-percent", "2")
    (tmp_path / "wiki.train.raw").write_bytes(b"a\n\xff\n")
    (tmp_path / "wiki.valid.raw").write_bytes(b"a\n")
    with pytest.raises(DataError, match="line 2 is not UTF-8"):
        tokenize("wikitext", tmp_path, model, tmp_path / "shards")


def test_only_a_heading_of_the_first_level_begins_an_article() -> None:
    """A line that begins like one, or is a heading of a section, does not; what precedes the first is an article."""
    text = ["before\n", " = A = \n", " = = b = = \n", " = 5 + 3 \n", "", " = Bc \u2028 d = \n", "x"]
    assert list(articles(text)) == ["before\n", " = A = \n = = b = = \n = 5 + 3 \n", " = Bc \u2028 d = \nx\n"]
