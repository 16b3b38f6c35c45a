"""The datasets that a quickstart and small studies make for themselves, without a download."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from data_tools.copying import write_copy
from data_tools.corpus import build_corpus
from data_tools.encode import encode_corpus
from data_tools.train_tokenizer import train_tokenizer
from kha_train.analysis.studies import Dataset
from kha_train.config.compose import compose, quoted
from kha_train.data.format.manifest import MANIFEST_NAME

FOLDER = "data"
Say = Callable[[str], None]


def text_stages(out: Path) -> dict[str, tuple[Path, Callable[[], object]]]:
    """The stages that make shards of the standard library's sources under `out`: name -> (the file that says that it is
    done, the call).
    """
    corpus, tokenizer, shards = out / "corpus", out / "tokenizer.model", out / "shards"
    vocab_size = compose().model.vocab_size
    return {
        "corpus: source code of Python's standard library": (
            corpus / "corpus.json",
            lambda: build_corpus(corpus, overwrite=True),
        ),
        "tokenizer: BPE trained on it": (
            tokenizer,
            lambda: train_tokenizer(corpus, tokenizer, vocab_size=vocab_size),
        ),
        "shards: the corpus as token ids": (
            shards / "validation" / MANIFEST_NAME,
            lambda: encode_corpus(corpus, tokenizer, shards, overwrite=True),
        ),
    }


def make_dataset(kind: Dataset, parent: Path, say: Say) -> None:
    """Make the dataset under `parent` unless it is there; studies in `parent` share it. `say` receives a line for every
    stage.
    """
    out = parent / FOLDER / kind
    if kind == "text":
        for name, (done, make) in text_stages(out).items():
            if not done.exists():
                say(name)
                make()
    elif kind == "copy" and not (out / "shards" / "validation" / MANIFEST_NAME).exists():
        say("copy: sequences to be repeated")
        write_copy(out / "shards")


def dataset_overrides(kind: Dataset, parent: Path) -> list[str]:
    """The settings that read the dataset; none for the user's own."""
    shards = parent / FOLDER / kind / "shards"
    places = {"data.train": shards / "train", "data.validation": shards / "validation"}
    return [] if kind == "own" else [f"{key}={quoted(str(path))}" for key, path in places.items()]
