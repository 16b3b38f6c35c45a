"""Shared by the tests of texts: shards with a tokenizer, a decoder that prefers some tokens, data of public tasks made
up in their layout.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_tools.encode import encode_corpus
from data_tools.train_tokenizer import train_tokenizer
from kha_train import compose
from kha_train.config.resolve import resolve_decoding
from kha_train.data.format.manifest import load
from kha_train.data.format.writer import prepare, publish_dataset, write_shard
from kha_train.data.tokenizer import Tokenizer
from kha_train.data.tokenizer_kinds import open_tokenizer
from kha_train.decode.generate import Decoder
from kha_train.evaluate.text_model import DecoderModel, Text
from kha_train.model.decoder import build_decoder

VOCAB_SIZE, CONTEXT = 300, 48


@dataclass(frozen=True)
class Corpus:
    """Shards with their tokenizer in `directory`, whose texts fit into rows; `overrides` of a small decoder on them.
    The validation set `framed` has the texts `held_out`, each with an id before it and none after it.
    """

    directory: Path
    overrides: list[str]
    tokenizer: Tokenizer
    held_out: list[str]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """See `Corpus`."""
    directory = tmp_path_factory.mktemp("texts")
    drawn = random.Random(0)
    words = ["red", "blue", "stone", "river", "über", "naïve", "12", "404", "the", "of", "and"]
    texts = {
        split: [" ".join(drawn.choices(words, k=drawn.randrange(3, 9))) for _ in range(count)]
        for split, count in (("train", 200), ("validation", 20))
    }
    (directory / "corpus").mkdir()
    for split, some in texts.items():
        lines = [json.dumps({"text": text, "path": str(number)}) + "\n" for number, text in enumerate(some)]
        (directory / "corpus" / f"{split}.jsonl").write_text("".join(lines))
    train_tokenizer(directory / "corpus", directory / "tokenizer.model", vocab_size=VOCAB_SIZE)
    encode_corpus(directory / "corpus", directory / "tokenizer.model", directory / "shards")
    tokenizer = open_tokenizer(directory / "tokenizer.model")
    framed = directory / "shards" / "framed"
    prepare(framed)
    eos = tokenizer.special_ids["eos"]
    ids = [np.concatenate(([eos], one)) for one in tokenizer.encode(texts["validation"])]
    documents = [(one, len(text.encode())) for one, text in zip(ids, texts["validation"], strict=True)]
    shard = write_shard(framed, 0, documents, vocab_size=VOCAB_SIZE, dtype="uint16")
    manifest = load(directory / "shards" / "train", field="data.train")
    (framed / "tokenizer.model").write_bytes((directory / "tokenizer.model").read_bytes())
    publish_dataset(framed, [shard], manifest.tokenizer, dtype="uint16", corpus={})
    sizes = ["model.layers=2", "model.hidden_size=32", "model.head_dim=8", "moe.expert_width=32"]
    overrides = [
        f"model.vocab_size={VOCAB_SIZE}",
        f"model.seq_len={CONTEXT}",
        *sizes,
        f"data.train={directory}/shards/train",
        f"data.validation={directory}/shards/validation",
        "data.packing=best_fit",
        f"data.cache_dir={directory}/cache",
        f"validation.sets=[{{name: framed, path: {framed}}}]",
        "validation.rows=0",
        "telemetry.wandb.mode=disabled",
        "telemetry.peak_tflops=0.1",
        "telemetry.console=quiet",
    ]
    return Corpus(directory, overrides, tokenizer, texts["validation"])


@pytest.fixture(scope="session")
def make_decoder(corpus: Corpus) -> Callable[..., Decoder]:
    """`make_decoder(preset)`: a random decoder of the corpus whose logits differ."""

    def make(preset: str = "kha_mlp") -> Decoder:
        config = compose([*corpus.overrides, f"attention={preset}", "moe.backend=loop"])
        decoder = build_decoder(config, resolve_decoding(config))
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in decoder.parameters():
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        return decoder.eval()

    return make


@pytest.fixture(scope="session")
def model(make_decoder: Callable[..., Decoder], corpus: Corpus) -> DecoderModel:
    """A random model with the corpus's tokenizer."""
    return DecoderModel(make_decoder(), Text.of(corpus.tokenizer, CONTEXT))


WriteLines = Callable[[Path, list[dict[str, Any]]], None]


@pytest.fixture(scope="session")
def write_lines() -> WriteLines:
    """Writes documents as a JSONL file."""

    def write(path: Path, documents: list[dict[str, Any]]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(document) + "\n" for document in documents))

    return write


@pytest.fixture(scope="session")
def public_data(tmp_path_factory: pytest.TempPathFactory, write_lines: WriteLines) -> Path:
    """Two made-up documents of each public task, in the layout that docs/evaluate.md says. The right answer of each is
    `right`, or the letter B."""
    data = tmp_path_factory.mktemp("public")
    choices = {"text": ["wrong", "right"], "label": ["A", "B"]}
    letters = {"A": "w", "B": "x", "C": "y", "D": "z"}
    two = {
        "allenai/ai2_arc/ARC-Challenge/test": {"question": "q", "choices": choices, "answerKey": "B"},
        "Rowan/hellaswag/validation": {
            "activity_label": "a", "ctx_a": "b", "ctx_b": "c", "endings": ["wrong", "right"], "label": "1",
        },
        "baber/piqa/validation": {"goal": "g", "sol1": "wrong", "sol2": "right", "label": 1},
        "allenai/winogrande/winogrande_xl/validation": {
            "sentence": "s _ end", "option1": "wrong", "option2": "right", "answer": "2",
        },
        "tau/commonsense_qa/validation": {
            "question": "q", "choices": {"text": list("vwxyz"), "label": list("ABCDE")}, "answerKey": "B",
        },
        "EleutherAI/race/high/test": {
            "article": "a",
            "problems": str([{"question": "q", "answer": "B", "options": ["wrong", "right", "wrong", "wrong"]}]),
        },
        "cais/mmlu/anatomy/test": {"question": "q", "choices": list("wxyz"), "answer": 1},
        "haonan-li/cmmlu/anatomy/test": {"Question": "q", **letters, "Answer": "B"},
        "ceval/ceval-exam/law/val": {"question": "q", **letters, "answer": "B"},
        "Idavidrein/gpqa/gpqa_main/train": {
            "Question": "q", "Correct Answer": "right", **{f"Incorrect Answer {n}": f"w{n}" for n in (1, 2, 3)},
        },
        "hails/agieval-aqua-rat/test": {"query": "q", "choices": ["wrong", "right"], "gold": [1]},
        "openai/gsm8k/main/test": {"question": "q", "answer": "so #### 4"},
    }  # fmt: skip
    for place, document in two.items():
        write_lines(data / f"{place}.jsonl", [document, document])
    return data
