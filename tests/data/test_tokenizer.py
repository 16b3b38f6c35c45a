"""The tokenizer loses nothing, and the same text gives the same model file."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kha_train.data import tokenizer as tokenizers
from kha_train.data.sentencepiece_model import SPECIAL_IDS, train
from kha_train.data.tokenizer import Tokenizer
from kha_train.data.tokenizer_kinds import open_tokenizer
from kha_train.errors import ConfigError, DataError

NAMES = [a + b for a in "abcdefghij" for b in "qrstuvwxyz"]
TEXT = [f"def {NAMES[i]}(x):\n    return x + {i}\n\n  Grüße, 世界 \U0001f600\t{i * i}\r\n" * 5 for i in range(60)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train(TEXT, tmp_path_factory.mktemp("tokenizer") / "t.model", vocab_size=360)


@settings(max_examples=400, deadline=None)
@given(text=st.text())
@example("▁ a▁▁b ▁")
@example("\x00<s></s><unk><0x41>\ufffd\u2585\t\t")
@example("  leading and trailing   \n ")
@example("\ufeffﬁ Å e\u0301 \u00a0\u3000")
def test_any_unicode_text_comes_back_unchanged(tokenizer: Tokenizer, text: str) -> None:
    (ids,) = tokenizer.encode([text])
    assert tokenizer.decode(ids) == text
    assert sum(tokenizer.bytes_per_id()[i] for i in ids) == len(text.encode())
    assert not set(ids.tolist()) & set(SPECIAL_IDS.values())


@settings(max_examples=200, deadline=None)
@given(data=st.binary())
def test_any_bytes_come_back_unchanged(tokenizer: Tokenizer, data: bytes) -> None:
    (ids,) = tokenizer.encode([data.decode("utf-8", "surrogateescape")])
    assert tokenizer.decode_bytes(ids) == data


def test_a_batch_is_encoded_like_its_texts_alone(tokenizer: Tokenizer) -> None:
    texts = ["", "a ▁ b", *TEXT[:5], "▁"]
    assert [ids.tolist() for ids in tokenizer.encode(texts)] == [tokenizer.encode([t])[0].tolist() for t in texts]


def test_ids_are_those_of_plain_sentencepiece(tokenizer: Tokenizer) -> None:
    plain = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.path))
    assert [ids.tolist() for ids in tokenizer.encode(TEXT)] == plain.encode(TEXT)
    assert tokenizer.special_ids == SPECIAL_IDS


def test_training_twice_gives_the_same_file(tokenizer: Tokenizer, tmp_path: Path) -> None:
    again = train(iter(TEXT), tmp_path / "again.model", vocab_size=360)
    assert again.sha256 == tokenizer.sha256
    assert train(TEXT[:30], tmp_path / "less.model", vocab_size=360).sha256 != tokenizer.sha256


def test_training_is_quiet(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    train(TEXT, tmp_path / "t.model", vocab_size=360)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("vocab_size", [10, 100_000])
def test_a_vocabulary_the_text_cannot_fill_is_refused(tmp_path: Path, vocab_size: int) -> None:
    with pytest.raises(ConfigError, match="vocab_size"):
        train(TEXT, tmp_path / "t.model", vocab_size=vocab_size)
    with pytest.raises(ConfigError, match="no text"):
        train([], tmp_path / "t.model", vocab_size=360)


def test_digits_stand_alone(tokenizer: Tokenizer) -> None:
    (ids,) = tokenizer.encode(["x 2025"])
    assert [tokenizer.decode([i]) for i in ids][-4:] == list("2025")


def test_text_that_utf8_cannot_express_is_a_data_error(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="UTF-8"):
        tokenizer.encode(["a\ud800b"])


def test_a_missing_file_and_one_that_is_no_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        open_tokenizer(tmp_path / "nothing")
    (tmp_path / "text").write_text("not a model")
    with pytest.raises(ConfigError, match="not a sentencepiece model"):
        open_tokenizer(tmp_path / "text")


@pytest.mark.parametrize(
    "option",
    [
        {"normalization_rule_name": "nmt_nfkc"},
        {"add_dummy_prefix": True},
        {"remove_extra_whitespaces": True},
        {"byte_fallback": False},
    ],
)
def test_a_model_that_loses_text_is_refused(tmp_path: Path, option: dict) -> None:
    faithful = {
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "byte_fallback": True,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT),
        model_prefix=str(tmp_path / "t"),
        model_type="bpe",
        vocab_size=330,
        minloglevel=2,
        **{**faithful, **option},
    )
    with pytest.raises(ConfigError, match="would lose text"):
        open_tokenizer(tmp_path / "t.model")


def plain_and_fast(path: Path) -> tuple[Tokenizer, Tokenizer]:
    tokenizer = open_tokenizer(path)
    return tokenizer, tokenizer.faster()


class OtherIds:
    """An encoder that is fast and wrong."""

    version = "0"

    def __init__(self, *, sentencepiece: bytes) -> None:
        self.asked: list[str] = []

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """One id for all."""
        self.asked += texts
        return [np.zeros(1, dtype=np.int32) for _ in texts]


TRICKY = [
    "",
    " ",
    "a\u2581b",
    "<s>",
    "x</s> y",
    "<unk>",
    "\x00",
    "naïve  \t\n 12345 😀",
    "<0x0A>",
    "\ud7ff",
    "word word",
]


def test_the_fast_encoder_gives_the_ids_of_sentencepiece(text_dataset: Path) -> None:
    pytest.importorskip("gigatoken")
    plain, fast = plain_and_fast(text_dataset / "tokenizer.model")
    assert "gigatoken" in fast.encoder
    generator = random.Random(3)
    texts = TRICKY + ["".join(generator.choices("ab c</s>\n\u2581é😀", k=200)) for _ in range(200)]
    for part in (texts, texts[::-1], [], TRICKY):
        assert [ids.tolist() for ids in fast.encode(part)] == [ids.tolist() for ids in plain.encode(part)]


def test_a_fast_encoder_with_other_ids_is_found_out(text_dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizers, "FastEncoder", OtherIds)
    fast = open_tokenizer(text_dataset / "tokenizer.model").faster()
    with pytest.raises(DataError, match="other ids than sentencepiece"):
        fast.encode(["word1 word2"])


def test_text_that_spells_a_control_piece_never_reaches_the_fast_encoder(
    text_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizers, "FastEncoder", OtherIds)
    plain, fast = plain_and_fast(text_dataset / "tokenizer.model")
    texts = ["a </s> b", "<s>", "<pad>", "\u2581"]
    assert [ids.tolist() for ids in fast.encode(texts)] == [ids.tolist() for ids in plain.encode(texts)]
    assert fast._fast.asked == []


@settings(max_examples=100, deadline=None)
@given(
    words=st.lists(
        st.sampled_from([*NAMES[:20], "def ", "return x + ", "Grüße, ", "\n    ", "世界", "\U0001f600"]), max_size=60
    ),
    between=st.text("dert xGrü:\n7", max_size=8),
    longest=st.integers(1, 40),
)
def test_a_long_text_encoded_in_parts_has_the_ids_of_the_whole(
    tokenizer: Tokenizer, words: list[str], between: str, longest: int
) -> None:
    text = between.join(words)
    plain = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.path))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tokenizers, "LONG_CHARACTERS", longest)
        parts = list(tokenizer._short_parts(text))
        assert tokenizer.encode([text])[0].tolist() == plain.encode(text)
    assert "".join(parts) == text


MEMORY = """
import resource, sys
from kha_train.data.tokenizer_kinds import open_tokenizer
tokenizer = open_tokenizer(sys.argv[1])
tokenizer.encode(["warm up"])
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
text = "def name(x):\\n    return x + 1\\n" * 200_000
before = peak()
print(len(text), len(tokenizer.encode([text])[0]), peak() - before)
"""


def test_one_long_document_takes_at_most_ten_times_its_size(tokenizer: Tokenizer) -> None:
    command = [sys.executable, "-c", MEMORY, str(tokenizer.path)]
    answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    size, ids, added = map(int, answer.split())
    assert ids > size / 20 and added < 10 * size
