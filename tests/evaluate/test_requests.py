"""Rows of requests: what they hold, and how ranks share them."""

from __future__ import annotations

import numpy as np
import pytest

from kha_train.errors import ConfigError
from kha_train.evaluate.requests import Row, deal, row_of


def test_a_row_keeps_what_the_model_can_see_and_all_that_is_scored() -> None:
    assert row_of([1, 2, 3], [4, 5], longest=8) == Row((1, 2, 3, 4, 5), 2)
    assert row_of([1, 2, 3], [4, 5], longest=3) == Row((2, 3, 4, 5), 2)
    assert row_of([1, 2, 3], [4, 5, 6], longest=3) == Row((3, 4, 5, 6), 3)
    with pytest.raises(ConfigError, match="longer than what the model sees"):
        row_of([1, 2, 3], [4, 5, 6, 7], longest=3)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_share_all_rows_in_batches_of_equal_shapes(world_size: int) -> None:
    rows = [Row(tuple(range(1, length + 1)), min(2, length - 1)) for length in (3, 9, 2, 5, 5, 7, 2, 1, 4, 8, 6)]
    of_ranks = [list(deal(rows, 2, rank, world_size)) for rank in range(world_size)]
    assert len({len(batches) for batches in of_ranks}) == 1
    numbers = []
    for together in zip(*of_ranks, strict=True):
        assert len({batch.rows_BW.shape for batch in together}) == 1 and len(together[0].rows_BW) <= 2
        for batch in together:
            labels_BT, filled_B = batch.labels_BT.numpy(), batch.layout.filled_N
            for place, number in enumerate(batch.samples_B.tolist()):
                scored = labels_BT[place][labels_BT[place] >= 0].tolist()
                if number < 0:
                    assert not scored and filled_B[place] == 0
                    continue
                numbers.append(number)
                ids, count = rows[number]
                assert scored == list(ids[len(ids) - count :]) and filled_B[place] == max(1, len(ids) - 1)
                assert batch.tokens_BT[place, : len(ids) - 1].tolist() == list(ids[:-1])
    assert sorted(numbers) == list(range(len(rows)))


def test_the_longest_rows_come_first_so_that_memory_is_tried_at_once() -> None:
    rows = [Row(tuple(range(length)), 1) for length in (2, 6, 4)]
    widths = [batch.rows_BW.shape[1] for batch in deal(rows, 1, 0, 1)]
    assert widths == [6, 4, 2] and np.array_equal(next(deal(rows, 1, 0, 1)).samples_B, [1])
