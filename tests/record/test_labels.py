"""Labels that are keys of tables and results."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kha_train.record.labels import distinct

FEW = st.sampled_from(["a", "b", "a (x)", "a (x) 2", "a (y)", ""])
"""Labels that collide with each other, and with what the collisions of others are turned into."""


@given(st.lists(st.tuples(FEW, st.sampled_from(["x", "y", "x) 2"])), max_size=8))
def test_no_two_labels_are_alike_and_a_label_that_was_alone_stays(pairs: list[tuple[str, str]]) -> None:
    labels, details = [label for label, _ in pairs], [detail for _, detail in pairs]
    made = distinct(labels, details)
    assert len(set(made)) == len(made) == len(labels)
    for label, new in zip(labels, made, strict=True):
        assert new == label if labels.count(label) == 1 else new.startswith(f"{label} (")
    assert distinct(made, details) == made


def test_a_label_that_is_there_twice_gets_its_detail_and_a_number_only_where_that_is_taken() -> None:
    assert distinct(["loss.csv", "loss.csv", "c"], ["m/a", "m/b", "m/c"]) == ["loss.csv (m/a)", "loss.csv (m/b)", "c"]
    assert distinct(["a", "a", "a (x)"], ["x", "x", "y"]) == ["a (x) 2", "a (x) 3", "a (x)"]
