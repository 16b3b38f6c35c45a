"""Writes a sentencepiece model as a `tokenizer.json` of the `tokenizers` library that gives the same ids.

Pieces are written with plain blanks, not with sentencepiece's sign U+2581, so that no normaliser has to rewrite the
text: a U+2581 in the text then becomes its three bytes, as in `Tokenizer.encode`. A text that spells a special piece
(`</s>`) is the one exception: the library reads it as that piece, which is how its users mark the end of a text.

Sentencepiece merges the neighbours whose joined piece has the best score, the leftmost first. The library merges by a
list of pairs, the leftmost of equal rank first. Listing every pair that joins to a piece, in the order of the pieces'
scores, gives the same merges. Unigram models have no exact counterpart: sentencepiece adds the scores of a segmentation
in fp32 and the library in fp64, so segmentations that tie, as those of a run of blanks do, are chosen differently.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from kha_train.data.sentencepiece_model import specification
from kha_train.errors import ConfigError

_BLANK = "\u2581"
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
"""The types of pieces, as sentencepiece's file format numbers them."""


def tokenizer_json(model: bytes) -> bytes:
    """The content of a `tokenizer.json` with the ids of a sentencepiece `model`, given as the bytes of its file.

    Raises ConfigError with the reason for a model that has no exact counterpart.
    """
    spec = specification(model)
    reason = _without_counterpart(spec)
    if reason:
        raise ConfigError(
            f"{reason}: the `tokenizers` library cannot give the same ids",
            field="tokenizer",
            allowed="BPE, identity normalisation, blanks kept, a piece for the blank, byte fallback",
        )
    prefix = spec.normalizer_spec.add_dummy_prefix
    decoders: list[dict[str, Any]] = [{"type": "ByteFallback"}, {"type": "Fuse"}]
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(spec),
        "normalizer": {"type": "Prepend", "prepend": " "} if prefix else None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": _bpe(spec),
    }
    return json.dumps(content, ensure_ascii=False, indent=1).encode() + b"\n"


def _without_counterpart(spec: Any) -> str:
    """Why `spec` cannot be converted exactly; empty if it can."""
    trainer, normalizer = spec.trainer_spec, spec.normalizer_spec
    kinds = Counter(piece.type for piece in spec.pieces)
    names = [_spelled(piece) for piece in spec.pieces]
    normal = _normal(spec)
    merged = [score for name, score in normal.items() if len(name) > 1]
    rewrites = normalizer.precompiled_charsmap or spec.denormalizer_spec.precompiled_charsmap
    faults = {
        "it is not a BPE model": trainer.model_type != trainer.BPE,
        "it has rules that rewrite characters": rewrites,
        "it removes blanks": normalizer.remove_extra_whitespaces,
        "it writes blanks in its own way": not normalizer.escape_whitespaces or trainer.treat_whitespace_as_suffix,
        "it has no piece for the blank": " " not in normal,
        "it has no byte fallback": kinds[_BYTE] != 256,
        "it has no piece for the unknown": kinds[_UNKNOWN] != 1,
        "it has pieces that are never used": kinds[_UNUSED],
        "it puts a blank before each text and has symbols of the user": normalizer.add_dummy_prefix
        and kinds[_USER_DEFINED],
        "two pieces differ by U+2581 alone": len(set(names)) != len(names),
        "two pieces have one score": len(set(merged)) != len(merged),
        "a letter of a piece is no piece": not set().union(*normal) <= normal.keys(),
    }
    return next((reason for reason, found in faults.items() if found), "")


def _spelled(piece: Any) -> str:
    """The text of a piece, with plain blanks."""
    return str(piece.piece.replace(_BLANK, " "))


def _normal(spec: Any) -> dict[str, float]:
    """The pieces that can be merged, with their scores."""
    return {_spelled(piece): piece.score for piece in spec.pieces if piece.type == _NORMAL}


def _added_tokens(spec: Any) -> list[dict[str, Any]]:
    """The pieces that are cut out of the text before the model sees it: special ones, and symbols of the user."""
    return [
        {
            "id": number,
            "content": _spelled(piece),
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": piece.type != _USER_DEFINED,
        }
        for number, piece in enumerate(spec.pieces)
        if piece.type in (_CONTROL, _UNKNOWN, _USER_DEFINED)
    ]


def _bpe(spec: Any) -> dict[str, Any]:
    """The model, with every pair of pieces that joins to a piece, the best score first."""
    normal = _normal(spec)
    merges = [
        (name[:cut], name[cut:])
        for name in sorted(normal, key=lambda name: -normal[name])
        for cut in range(1, len(name))
        if name[:cut] in normal and name[cut:] in normal
    ]
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": next(_spelled(piece) for piece in spec.pieces if piece.type == _UNKNOWN),
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": True,
        "ignore_merges": False,
        "vocab": {_spelled(piece): number for number, piece in enumerate(spec.pieces)},
        "merges": merges,
    }
