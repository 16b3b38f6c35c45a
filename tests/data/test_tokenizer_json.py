"""A tokenizer.json of the `tokenizers` library keeps every byte, with the ids of the library itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Library

from kha_train.data import tokenizer as contract
from kha_train.data.tokenizer_json import TokenizerJson
from kha_train.data.tokenizer_kinds import chosen_tokenizer, open_tokenizer
from kha_train.data.tokenizer_parts import byte_alphabet
from kha_train.errors import ConfigError, DataError

WORDS = [
    "def f(x):\n",
    "    return x",
    "Grüße, ",
    "세계와 ",
    "世界",
    "\U0001f600",
    "\t\t",
    "  ",
    "\r\n",
    "12345",
    "it's",
]
LINES = [" ".join(WORDS[number % 11 :] + WORDS[: number % 7]) for number in range(77)]
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPECIAL = ["<|endoftext|>", "<|im_start|>"]
TEXTS = st.one_of(st.text(), st.lists(st.sampled_from([*WORDS, *SPECIAL, "\u2581", "<0x41>"])).map("".join))


def byte_level(*first: pre_tokenizers.PreTokenizer, regex: bool = True, nfc: bool = False) -> Library:
    """A trained tokenizer as GPT-2's; with a split `first` and Unicode's composition, as Qwen's."""
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [*first, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)]
    )
    library.normalizer = normalizers.NFC() if nfc else None
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    library.train_from_iterator(LINES, trainer)
    library.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    return library


def byte_fallback() -> Library:
    """A tokenizer as Llama 2's: U+2581 for blanks, one before each text, bytes for what has no piece."""
    letters = sorted({letter for line in LINES[:3] for letter in line.replace(" ", "\u2581")} | {"\u2581"})
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters, "\u2581\u2581", "re"]
    vocab = {token: number for number, token in enumerate(tokens)}
    merges = [("\u2581", "\u2581"), ("r", "e")]
    library = Library(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    library.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    library.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    library.add_special_tokens(["<unk>", "<s>", "</s>"])
    return library


MADE = {
    "gpt2": byte_level,
    "qwen": lambda: byte_level(pre_tokenizers.Split(Regex(QWEN), "isolated"), regex=False, nfc=True),
    "llama2": byte_fallback,
}


@pytest.fixture(scope="module", params=MADE)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[TokenizerJson, Library]:
    path = tmp_path_factory.mktemp(request.param) / "tokenizer.json"
    MADE[request.param]().save(str(path))
    library = Library.from_file(str(path))
    library.encode_special_tokens = True
    own = open_tokenizer(path)
    assert isinstance(own, TokenizerJson)
    return own, library


@settings(max_examples=300, deadline=None)
@given(text=TEXTS)
@example("▁ a▁▁b ▁")
@example("\x00<s></s><unk><0x41>\ufffd\u2585\t\t")
@example("  leading and trailing   \n ")
@example("\ufeffﬁ Å e\u0301 \u00a0\u3000")
def test_any_unicode_text_comes_back_unchanged(both: tuple[TokenizerJson, Library], text: str) -> None:
    tokenizer, _ = both
    (ids,) = tokenizer.encode([text])
    whole = (tokenizer.prefix if text else "") + text
    assert tokenizer.decode(ids) == whole
    assert sum(tokenizer.bytes_per_id()[i] for i in ids) == len(whole.encode())
    assert not set(ids.tolist()) & set(tokenizer.special_ids.values())


@settings(max_examples=200, deadline=None)
@given(text=TEXTS)
@example(" it's 12345  <tool> x")
def test_ids_are_those_of_the_library_and_ids_spell_its_text(both: tuple[TokenizerJson, Library], text: str) -> None:
    """For text in Unicode's composed form, and without the sign that stands for a blank."""
    tokenizer, library = both
    text = normalizers.NFC().normalize_str(text).replace("\u2581", "_")
    ids = tokenizer.encode([text])[0].tolist()
    assert ids == library.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids).removeprefix(tokenizer.prefix) == library.decode(ids)


@settings(max_examples=100, deadline=None)
@given(data=st.binary())
def test_any_bytes_come_back_unchanged(both: tuple[TokenizerJson, Library], data: bytes) -> None:
    tokenizer, _ = both
    (ids,) = tokenizer.encode([data.decode("utf-8", "surrogateescape")])
    assert tokenizer.decode_bytes(ids) == (tokenizer.prefix.encode() if data else b"") + data


def test_a_batch_is_encoded_like_its_texts_alone_and_like_one_thread(both: tuple[TokenizerJson, Library]) -> None:
    tokenizer, _ = both
    texts = ["", "a ▁ b", *LINES[:5], "▁"]
    alone = [tokenizer.encode([text])[0].tolist() for text in texts]
    assert [ids.tolist() for ids in tokenizer.encode(texts)] == alone
    assert [ids.tolist() for ids in open_tokenizer(tokenizer.path, threads=1).encode(texts)] == alone
    assert tokenizer.encode([]) == []


def test_the_characters_that_stand_for_bytes_are_those_of_the_library() -> None:
    alphabet = byte_alphabet()
    assert set(alphabet) == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(alphabet.values()) == list(range(256))
    spelled = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for text in ("\x00\n é\u07ff\uffff", "".join(map(chr, range(1, 128)))):
        ((letters, _),) = spelled.pre_tokenize_str(text)
        assert bytes(alphabet[letter] for letter in letters) == text.encode()


def saved(tmp_path: Path, library: Library, **changes: Any) -> Path:
    """The library's file, with other values of some fields."""
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(library.to_str()), **changes}))
    return path


def test_special_ids_are_those_that_the_files_beside_name_or_the_usual_ones(tmp_path: Path) -> None:
    path = saved(tmp_path, byte_level())
    assert open_tokenizer(path).special_ids == {"eos": 0}
    settings_file = tmp_path / "tokenizer_config.json"
    settings_file.write_text(json.dumps({"eos_token": {"content": "<|im_start|>"}, "pad_token": "<|endoftext|>"}))
    assert open_tokenizer(tmp_path).special_ids == {"eos": 1, "pad": 0}
    entry = chosen_tokenizer(path, eos="<tool>", vocab_size=400).entry()
    last = Library.from_file(str(path)).token_to_id("<tool>")
    assert entry.special_ids["eos"] == last and entry.bytes_per_id[last] == 6
    assert entry.vocab == len(entry.bytes_per_id) == 400 and set(entry.bytes_per_id[last + 1 :]) == {0}
    with pytest.raises(ConfigError, match="no such token"):
        chosen_tokenizer(path, eos="<none>")
    with pytest.raises(ConfigError, match="more ids"):
        chosen_tokenizer(path, vocab_size=300)


NOT_KEPT = {
    "its normaliser Lowercase": {"normalizer": {"type": "Lowercase"}},
    "its normaliser NFKC": {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "NFKC"}]}},
    "its pre-tokeniser Whitespace": {"pre_tokenizer": {"type": "Whitespace"}},
    "no byte fallback": {"pre_tokenizer": None},
    "its pre-tokeniser Split": {
        "pre_tokenizer": {"type": "Split", "pattern": {"String": "a"}, "behavior": "Removed", "invert": False}
    },
    "swallow the blanks": {
        "added_tokens": [{"id": 330, "content": "<tool>", "special": False, "lstrip": True, "rstrip": False}]
    },
    "no token for the byte": {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}},
    "is not a known model": {"model": {"type": "WordPiece", "vocab": {}}},
    "drops merges": {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [], "dropout": 0.1}},
    "the library tokenizers rejects it": {"version": "99"},
    "out of range": {"added_tokens": [{"id": 2**40, "content": "x", "special": True}]},
    "wrong type": {"model": []},
}


@pytest.mark.parametrize("reason", NOT_KEPT)
def test_a_file_that_would_lose_text_or_is_malformed_is_refused_with_the_reason(reason: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=reason):
        open_tokenizer(saved(tmp_path, byte_level(), **NOT_KEPT[reason]))


@pytest.mark.parametrize("content", ["", "[1, 2]", "{", "[" * 5000, '{"model": NaN}'])
def test_a_file_that_is_no_tokenizer_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ConfigError):
        open_tokenizer(tmp_path)


def test_ids_that_do_not_give_the_text_back_are_a_data_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = open_tokenizer(saved(tmp_path, byte_level()))
    monkeypatch.setattr(tokenizer, "library_ids", lambda texts: [[5] for _ in texts])
    with pytest.raises(DataError, match="does not give this text back"):
        tokenizer.encode(["abc"])


def test_what_is_left_out_of_the_pipeline_is_part_of_the_encoders_name(tmp_path: Path) -> None:
    assert open_tokenizer(saved(tmp_path, MADE["qwen"]())).encoder == "tokenizers without NFC"
    assert open_tokenizer(saved(tmp_path, byte_fallback())).encoder == "tokenizers"


def test_metaspace_puts_a_blank_before_every_text_so_that_none_is_lost(tmp_path: Path) -> None:
    """As the library puts one before a text that begins without; it would take " x" and "x" for the same text."""
    pre = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False}
    path = saved(tmp_path, byte_fallback(), normalizer=None, pre_tokenizer=pre)
    tokenizer, library = open_tokenizer(path), Library.from_file(str(path))
    assert library.encode(" re x").ids == library.encode("re x").ids
    for text in ("re x", "x  re", *(line for line in LINES if not line.startswith(" "))):
        assert tokenizer.encode([text])[0].tolist() == library.encode(text).ids
    assert tokenizer.decode(tokenizer.encode([" re x"])[0]) == "  re x"


@settings(max_examples=100, deadline=None)
@given(words=st.lists(st.sampled_from(WORDS), max_size=60), longest=st.integers(1, 40))
def test_a_long_text_of_a_tokenizer_without_cuts_is_encoded_in_parts(
    both: tuple[TokenizerJson, Library], words: list[str], longest: int
) -> None:
    tokenizer, library = both
    text = "".join(words)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(contract, "LONG_CHARACTERS", longest)
        assert tokenizer.encode([text])[0].tolist() == library.encode(text, add_special_tokens=False).ids
        if tokenizer.pieces is None:
            assert list(tokenizer._short_parts(text)) == [text] * bool(text)
