"""The datasets that a quickstart and small studies make for themselves, without a download."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from data_tools.corpus import build_corpus
from data_tools.encode import encode_corpus
from data_tools.tasks import Order, write_task
from data_tools.train_tokenizer import train_tokenizer
from kha_train.analysis.studies import Dataset
from kha_train.config.compose import compose, quoted
from kha_train.data.format.manifest import MANIFEST_NAME

FOLDER = "data"
SMALL_TASKS = {
    task: Order(task, documents=16_000, levels=(level,), symbols=32)
    for task, level in {"copy": 8, "induction": 16, "mqar": 4, "recall": 32}.items()
}
"""Tasks of one level that a model of two layers can learn in minutes; documents of up to 68 tokens."""
Say = Callable[[str], None]


def text_stages(out: Path, own_tokenizer: Path | None = None) -> dict[str, tuple[Path, Callable[[], object]]]:
    """The stages that make shards of the standard library's sources under `out`: name -> (the file that says that it is
    done, the call). No tokenizer is trained where the user gives one.
    """
    corpus, tokenizer, shards = out / "corpus", own_tokenizer or out / "tokenizer.model", out / "shards"
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
    if kind == "text":
        for name, (done, make) in text_stages(parent / FOLDER / kind).items():
            if not done.exists():
                say(name)
                make()
    for task in _tasks_of(kind):
        shards = _shards(parent, task)
        if not (shards / "validation" / MANIFEST_NAME).exists():
            say(f"{task}: documents of a synthetic task")
            write_task(SMALL_TASKS[task].complete(), shards, overwrite=True)


def dataset_overrides(kind: Dataset, parent: Path) -> list[str]:
    """The settings that read the dataset; none for the user's own. A model of several tasks is trained on all alike."""
    if kind == "own":
        return []
    tasks = _tasks_of(kind)
    train, validation = (
        {name: quoted(str(_shards(parent, name) / split)) for name in tasks or (kind,)}
        for split in ("train", "validation")
    )
    if len(tasks) < 2:
        answers = ["evaluation.tasks=[{name: answers}]"] if tasks else []
        return [f"data.train={train[kind]}", f"data.validation={validation[kind]}", *answers]
    sources = ", ".join(f"{{name: {task}, path: {path}, weight: 1}}" for task, path in train.items())
    sets = ", ".join(f"{{name: {task}, path: {path}}}" for task, path in validation.items())
    scored = ", ".join(f"{{name: answers, label: {task}, set: {task}}}" for task in tasks)
    return [
        "data.train=''",
        f"data.sources=[{sources}]",
        f"data.validation={validation[tasks[0]]}",
        f"validation.sets=[{sets}]",
        f"evaluation.tasks=[{scored}]",
    ]


def _tasks_of(kind: Dataset) -> tuple[str, ...]:
    return tuple(SMALL_TASKS) if kind == "tasks" else (kind,) if kind in SMALL_TASKS else ()


def _shards(parent: Path, name: str) -> Path:
    return parent / FOLDER / name / "shards"
