"""Documents to be copied: what they are, and what a dataset of them says."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data_tools.copying import ANSWER_ID, FIRST_SYMBOL, copies, write_copy
from kha_train.data.format.shards import ShardSet


def test_a_copy_is_symbols_the_mark_the_same_symbols_and_the_end() -> None:
    lengths = set()
    for ids in copies(range(200), symbols=5, key=1, lengths=(2, 6)):
        count = (len(ids) - 2) // 2
        lengths.add(count)
        assert len(ids) == 2 * count + 2 and ids[count] == ANSWER_ID and ids[-1] == 0
        assert (ids[:count] == ids[count + 1 : -1]).all()
        assert ids[:count].min() >= FIRST_SYMBOL and ids[:count].max() < FIRST_SYMBOL + 5
    assert lengths == {2, 3, 4, 5, 6}


def test_documents_depend_on_their_number_alone_and_symbols_are_evenly_drawn() -> None:
    whole = [ids.tolist() for ids in copies(range(50), 62, 0, (7, 15))]
    assert [ids.tolist() for ids in copies(range(30, 50), 62, 0, (7, 15))] == whole[30:]
    assert len({tuple(ids) for ids in whole}) == 50
    drawn = np.concatenate([ids[: len(ids) // 2 - 1] for ids in copies(range(4000), 8, 0, (7, 15))])
    counts = np.bincount(drawn - FIRST_SYMBOL, minlength=8)
    assert abs(counts / counts.mean() - 1).max() < 0.05


def test_a_dataset_says_its_marks_and_counts_symbols_as_text(tmp_path: Path) -> None:
    train, validation = write_copy(tmp_path, symbols=30, documents=100, validation_documents=10, lengths=(3, 3))
    assert train.tokenizer.special_ids == {"eos": 0, "answer": 1} and train.tokenizer.vocab == 32
    assert (train.tokens, train.text_bytes, validation.documents) == (100 * 8, 100 * 6, 10)
    assert ShardSet.open(tmp_path / "train").token_counts()[ANSWER_ID] == 100
    assert train.content_id != validation.content_id
