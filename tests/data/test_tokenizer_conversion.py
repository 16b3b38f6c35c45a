"""A converted tokenizer.json gives the ids of the sentencepiece model, checked with both libraries themselves."""

from __future__ import annotations

import io
import random
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library

from kha_train.data.sentencepiece_model import specification
from kha_train.data.tokenizer_conversion import tokenizer_json
from kha_train.data.tokenizer_kinds import open_tokenizer
from kha_train.errors import ConfigError

WORDS = ["def ", "return x", "Grüße, ", "세계와 ", "世界", "\U0001f600", "\t\t", "  ", "\r\n", "aaab", "abab", "12 345"]
LINES = ["".join(random.Random(number).choices(WORDS, k=30)) for number in range(200)]
FAITHFUL = {
    "normalization_rule_name": "identity",
    "add_dummy_prefix": False,
    "remove_extra_whitespaces": False,
    "byte_fallback": True,
}
KINDS = {
    "bpe": {"model_type": "bpe"},
    "bpe, dummy prefix": {"model_type": "bpe", "add_dummy_prefix": True},
    "bpe, symbols of the user": {"model_type": "bpe", "user_defined_symbols": ["<|user|>", "xx", "xxy"]},
}


def trained(**options: object) -> bytes:
    """A sentencepiece model of 340 pieces."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES),
        model_writer=model,
        vocab_size=340,
        hard_vocab_limit=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        required_chars="\u2581",
        pad_id=3,
        minloglevel=2,
        **{**FAITHFUL, **options},
    )
    return model.getvalue()


@pytest.fixture(scope="module", params=KINDS)
def both(request: pytest.FixtureRequest) -> tuple[sentencepiece.SentencePieceProcessor, Library]:
    model = trained(**KINDS[request.param])
    return sentencepiece.SentencePieceProcessor(model_proto=model), Library.from_str(tokenizer_json(model).decode())


@settings(max_examples=400, deadline=None)
@given(text=st.one_of(st.text(), st.text("ab x12\t\n"), st.lists(st.sampled_from(WORDS)).map("".join)))
@example("  edge blanks  ")
@example("\ufeffﬁ Å e\u0301 \u00a0\u3000\x00\x7f")
@example("aaaaaaaaaaaaabababababaaaab" * 20)
@example("<|user|>xxyxx<|user|")
def test_ids_and_text_are_those_of_sentencepiece(
    both: tuple[sentencepiece.SentencePieceProcessor, Library], text: str
) -> None:
    plain, library = both
    text = text.replace("\u2581", "_")  # sentencepiece takes it for a blank
    ids = plain.encode(text)
    assert library.encode(text, add_special_tokens=False).ids == ids
    assert library.decode(ids) == text


def test_a_blank_sign_in_the_text_becomes_its_bytes_as_in_training(tmp_path: Path) -> None:
    """For sentencepiece itself it is a blank: `Tokenizer.encode` keeps it, and a model was trained on those ids."""
    (tmp_path / "t.model").write_bytes(model := trained(model_type="bpe"))
    own, library = open_tokenizer(tmp_path / "t.model"), Library.from_str(tokenizer_json(model).decode())
    for text in ("\u2581", " a\u2581 b\u2581\u2581x", *LINES[:20]):
        ids = own.encode([text])[0].tolist()
        assert library.encode(text, add_special_tokens=False).ids == ids
        assert library.decode(ids) == text


def test_special_pieces_keep_their_ids_and_are_left_out_of_decoded_text() -> None:
    model = trained(model_type="bpe")
    plain, library = (
        sentencepiece.SentencePieceProcessor(model_proto=model),
        Library.from_str(tokenizer_json(model).decode()),
    )
    names = ("<s>", "</s>", "<pad>", "<unk>")
    assert [library.token_to_id(name) for name in names] == [plain.piece_to_id(name) for name in names]
    assert library.decode([plain.bos_id(), *plain.encode("x 1"), plain.eos_id()]) == "x 1"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"model_type": "unigram"}, "not a BPE model"),
        ({"normalization_rule_name": "nmt_nfkc"}, "rewrite characters"),
        ({"remove_extra_whitespaces": True}, "removes blanks"),
        ({"byte_fallback": False}, "no byte fallback"),
        ({"add_dummy_prefix": True, "user_defined_symbols": ["xx"]}, "symbols of the user"),
    ],
)
def test_a_model_without_an_exact_counterpart_is_refused_with_the_reason(options: dict, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        tokenizer_json(trained(**{"model_type": "bpe", **options}))


def test_equal_scores_and_letters_outside_the_vocabulary_are_refused() -> None:
    """Then the order of merges does not follow from the scores, or a merge has a part that has no id."""
    spec = specification(trained(model_type="bpe"))
    merged = [piece for piece in spec.pieces if piece.type == 1 and len(piece.piece) > 1]
    merged[0].score = merged[1].score
    with pytest.raises(ConfigError, match="one score"):
        tokenizer_json(spec.SerializeToString())
    merged[0].score, merged[0].piece = 1.0, "\u4e00\u4e01"
    with pytest.raises(ConfigError, match="a letter of a piece"):
        tokenizer_json(spec.SerializeToString())
