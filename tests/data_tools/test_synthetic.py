"""The synthetic source: the same numbers everywhere, documents of very unequal lengths."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data_tools.synthetic import END_ID, generate, write_dataset
from kha_train.data.format.shards import ShardSet

GOLDEN = [
    [5, 9, 13, 0],
    [6, 11, 0],
    [0],
    [16, 0],
    [2, 3, 0],
    [8, 15, 22, 29, 36, 0],
    [7, 12, 17, 22, 27, 32, 37, 42, 47, 3, 0],
    [8, 15, 22, 29, 36, 43, 0],
]


def test_golden_documents_never_change() -> None:
    assert [ids.tolist() for ids in generate(range(8), 50, 3, 16)] == GOLDEN
    assert [ids.tolist() for ids in generate(range(5, 8), 50, 3, 16)] == GOLDEN[5:]


def test_the_same_seed_gives_the_same_dataset_and_another_seed_another(tmp_path: Path) -> None:
    made = [write_dataset(tmp_path / str(i), vocab_size=64, documents=80, seed=s) for i, s in enumerate((1, 1, 2))]
    assert made[0] == made[1]
    assert made[0][0].content_id != made[2][0].content_id
    assert made[0][0].content_id != made[0][1].content_id


def test_lengths_are_very_unequal_and_ids_stay_inside(tmp_path: Path) -> None:
    write_dataset(tmp_path, vocab_size=70_000, documents=300, max_length=500)
    opened = ShardSet.open(tmp_path / "train")
    lengths = np.concatenate(
        [np.diff(opened.document_ends(i, 0, s.tokens), prepend=0) for i, s in enumerate(opened.manifest.shards)]
    )
    assert len(lengths) == 300 and lengths.min() <= 2 and lengths.max() > 300
    assert opened.manifest.dtype == "uint32"
    counts = opened.token_counts()
    assert counts[END_ID] == 300 and counts.sum() == lengths.sum()
