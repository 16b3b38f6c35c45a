"""The tokenizer of an export gives transformers our ids and our text, and held-out lines show it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from kha_train.config.compose import compose
from kha_train.config.schema import RunConfig
from kha_train.data.format.writer import prepare, publish_dataset, write_shard
from kha_train.data.sentencepiece_model import train
from kha_train.data.tokenizer_kinds import open_tokenizer
from kha_train.errors import ConfigError
from kha_train.export.hugging_face import check_tokenizer, load_tokenizer
from kha_train.export.tokenizer_files import Wanted, speech_of, write_tokenizer

pytest.importorskip("transformers")

WORDS = "the quick brown fox jumps over 12 lazy dogs, while 345 others sleep\n"
ODD = (
    "\ttabs\tinside",
    "  edge blanks  ",
    "한국어 텍스트",
    "emoji \U0001f600 and \u2581",
    "x = {'a': 1}  # 2026",
    "ﬁ\r\\n",
)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A configuration whose validation set is text, with the tokenizer that made it."""
    texts = ["\n".join((*ODD, WORDS, "a </s> that spells the end")) + "\n", WORDS * 20]
    return written(tmp_path_factory.mktemp("text"), texts)


def written(folder: Path, texts: list[str]) -> RunConfig:
    """A configuration whose validation set is `texts`, with the tokenizer that made it."""
    tokenizer = train([WORDS * 40], folder / "tokenizer.model", vocab_size=320)
    validation = folder / "validation"
    prepare(validation)
    encoded = zip(tokenizer.encode(texts), texts, strict=True)
    documents = [(np.append(ids, tokenizer.special_ids["eos"]), len(text.encode())) for ids, text in encoded]
    shard = write_shard(validation, 0, documents, vocab_size=320, dtype="uint16")
    file = folder / "tokenizer.model"
    publish_dataset(validation, [shard], tokenizer.entry(), dtype="uint16", corpus={}, tokenizer_file=file)
    return compose(["model=tiny", "model.vocab_size=320", f"data.validation={validation}"])


def test_transformers_gives_the_ids_and_the_text_of_held_out_lines(config: RunConfig, tmp_path: Path) -> None:
    speech = speech_of(config, Wanted())
    assert {"\ttabs\tinside", "한국어 텍스트", "  edge blanks  "} <= set(speech.text.lines)
    assert not any("</s>" in line for line in speech.text.lines)
    write_tokenizer(tmp_path, speech, 256)
    lines, ids = list(speech.text.lines), [list(one) for one in speech.text.ids]
    found = check_tokenizer(tmp_path, lines, ids)
    assert found["other_ids"] == found["other_text"] == []
    ids[3] = ids[3][:-1]
    assert check_tokenizer(tmp_path, lines, ids)["other_ids"] == [lines[3]]
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    ours = open_tokenizer(Path(config.data.validation)).encode(["the fox"])[0].tolist()
    assert tokenizer("the fox")["input_ids"] == ours
    assert speech.config() == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["model_max_length"] == 256


def test_tokenizer_and_lines_may_be_named_where_the_data_are_gone(config: RunConfig, tmp_path: Path) -> None:
    moved = compose(["model=tiny", "model.vocab_size=320", f"data.validation={tmp_path}/gone"])
    with pytest.raises(ConfigError) as refused:
        speech_of(moved, Wanted())
    assert "--tokenizer" in refused.value.line() and "--no-tokenizer" in refused.value.line()
    (tmp_path / "lines.txt").write_text("\none line\n\n두 줄\n")
    file = Path(config.data.validation) / "tokenizer.model"
    speech = speech_of(moved, Wanted(file, tmp_path / "lines.txt"))
    assert speech.text.lines == ["one line", "두 줄"] and speech.special_ids["eos"] == 2
    with pytest.raises(ConfigError, match="no held-out line"):
        (tmp_path / "lines.txt").write_text("\n\n")
        speech_of(moved, Wanted(file, tmp_path / "lines.txt"))
    small = compose(["model=tiny", "model.vocab_size=200"])
    with pytest.raises(ConfigError, match="320 ids"):
        speech_of(small, Wanted(file, tmp_path / "lines.txt"))
    assert speech_of(moved, Wanted(none=True)).content == b""


def test_documents_of_one_line_without_its_end_are_lines_too(tmp_path: Path) -> None:
    config = written(tmp_path, ["the quick fox", "lazy dogs", "12 others"])
    assert speech_of(config, Wanted()).text.lines == ["the quick fox", "lazy dogs", "12 others"]
