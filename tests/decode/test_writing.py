"""Texts that grow token by token: stop strings, the end of a document, and what may be shown already."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kha_train.decode.sampling import Sampling
from kha_train.decode.writing import Order, Writing, write

EOS = 256


def decode(ids: Sequence[int]) -> str:
    """Ids that are bytes."""
    return bytes(ids).decode("utf-8", "replace")


def written(text: str, *stops: str, eos: bool = False) -> tuple[Writing, str]:
    """The text of the bytes of `text`, one after another, and what was shown of it on the way."""
    writing, shown = Writing(decode, EOS, stops), ""
    for token in [*text.encode(), *[EOS] * eos]:
        writing.add(token)
        settled = writing.settled(finished=False)
        assert settled.startswith(shown)
        shown = settled
    return writing, shown


def test_a_text_ends_before_the_first_stop_string_and_keeps_the_ids_that_made_it() -> None:
    writing, shown = written("one\n\ntwo END three", "END", "\n\n")
    assert (writing.text, writing.end, shown) == ("one", "stop", "one") and decode(writing.ids) == "one\n\n"
    writing, _ = written("ab", "")
    assert (writing.text, writing.end) == ("ab", "length")


def test_a_document_ends_with_its_id_which_is_left_out() -> None:
    writing, shown = written("ab", "x", eos=True)
    assert (writing.text, writing.end, writing.ids, shown) == ("ab", "eos", [97, 98], "ab")
    writing.add(99)
    assert writing.ids == [97, 98]


def test_half_a_character_and_the_beginning_of_a_stop_string_are_held_back() -> None:
    writing = Writing(decode, None, ("STOP",))
    for token, settled in zip("é😀 STO".encode(), ["", "é", "é", "é", "é", "é😀", "é😀 ", *["é😀 "] * 3], strict=True):
        writing.add(token)
        assert writing.settled(finished=False) == settled
    assert writing.settled(finished=True) == "é😀 STO"


@given(st.text("ab\né", max_size=30), st.lists(st.text("ab\né", min_size=1, max_size=4), max_size=3))
def test_what_was_shown_is_the_text_up_to_the_first_stop_string(text: str, stops: list[str]) -> None:
    writing, shown = written(text, *stops)
    ends = [text.find(stop) for stop in stops if stop in text]
    if not ends:
        assert writing.text == text and text.startswith(shown)
    else:
        # The stop string that is complete first ends it, wherever another one begins.
        first = min(text.find(stop) + len(stop) for stop in stops if stop in text)
        begun = text[:first]
        assert writing.text == shown == begun[: min(begun.find(stop) for stop in stops if stop in begun)]


def test_rows_of_one_length_go_together_and_a_batch_ends_with_its_last_text() -> None:
    asked: list[tuple[list[list[int]], tuple[int, ...]]] = []

    def go_on(prompt_BT: Tensor, sampling: Sampling) -> Iterator[Tensor]:
        """Every row counts on from its last id."""
        asked.append((prompt_BT.tolist(), sampling.streams))
        for number in range(1, sampling.tokens + 1):
            yield prompt_BT[:, -1] + number

    told: list[int] = []
    order = Order([[97], [1, 120], [100]], Sampling(tokens=50), samples=2, batch=3, eos=123, stops=("d",))
    found = write(order, go_on, decode, lambda row, writing: told.append(row))
    assert [one.text for one in found] == ["bc", "bc", "yz", "yz", "efghijklmnopqrstuvwxyz", "efghijklmnopqrstuvwxyz"]
    assert asked == [([[97], [97], [100]], (0, 1, 0)), ([[100]], (1,)), ([[1, 120]] * 2, (0, 1))]
    assert [told.count(row) for row in range(6)] == [3, 3, 3, 3, 23, 23]


@pytest.mark.parametrize("tokens", [1, 3])
def test_the_number_of_tokens_ends_a_text(tokens: int) -> None:
    go_on = lambda prompt_BT, sampling: (torch.tensor([97]) for _ in range(sampling.tokens))
    (found,) = write(Order([[1]], Sampling(tokens=tokens)), go_on, decode)
    assert (found.text, found.end) == ("a" * tokens, "length")
