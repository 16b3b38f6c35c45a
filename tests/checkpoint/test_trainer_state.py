"""Trainer state reads back bit for bit, or is refused before anything is written."""

from __future__ import annotations

import math
import struct
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kha_train.checkpoint.background import write
from kha_train.checkpoint.reader import find_newest
from kha_train.checkpoint.trainer_state import decode_state, encode_state
from kha_train.distributed import World
from kha_train.errors import CheckpointError


def identity(value: Any) -> Any:
    """A form in which equality means the same type and the same bits (all NaNs alike)."""
    if isinstance(value, dict):
        return {key: identity(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [identity(entry) for entry in value]
    if isinstance(value, float):
        return "nan" if math.isnan(value) else struct.pack("<d", value)
    return type(value), value


states = st.dictionaries(
    st.text(max_size=8),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
        max_leaves=10,
    ),
    max_size=4,
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(states)
def test_every_plain_value_comes_back_with_its_type_and_bits(state) -> None:
    assert identity(decode_state(encode_state(state))) == identity(state)


def test_awkward_floats_survive_a_save(tmp_path) -> None:
    state = {"floats": [0.1, -0.0, 5e-324, 1.7976931348623157e308, 1 / 3, math.nan, math.inf, -math.inf], "big": 2**200}
    write(tmp_path, 1, World.single(), [], {}, state)
    assert identity(find_newest(tmp_path, World.single(), pytest.fail).trainer_state) == identity(state)


@pytest.mark.parametrize(
    "value", [(1, 2), {1: 2}, {"$float": "nan"}, b"x", {1}, np.float64(0.5), np.int64(1), torch.zeros(1), object()]
)
def test_a_value_that_would_not_come_back_is_refused_by_name_on_every_rank(tmp_path, run_ranks, value) -> None:
    state = {"detector": {"window": [1.0, value]}}
    for outcome in run_ranks(2, lambda world: write(tmp_path, 1, world, [], {}, state if world.rank == 0 else {})):
        assert isinstance(outcome, CheckpointError) and "trainer_state.detector.window[1]" in str(outcome)
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
    "raw", [b"", b"[]", b"NaN", b'{"a": Infinity}', b'{"a": {"$float": "1"}}', b"\xff", b"[" * 10**5]
)
def test_text_that_is_no_trainer_state_is_refused(raw) -> None:
    with pytest.raises(CheckpointError, match="trainer.json"):
        decode_state(raw)
