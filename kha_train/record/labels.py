"""Makes the labels of runs and curves distinct."""

from __future__ import annotations

from collections.abc import Sequence


def distinct(labels: Sequence[str], details: Sequence[str]) -> list[str]:
    """`labels` made distinct, in order, so that they can be keys of a table or a dict.

    A label that occurs once is unchanged. Others get their detail, such as a path, in parentheses. If the result is
    still taken, a number follows.
    """
    taken = {label for label in labels if labels.count(label) == 1}
    made = []
    for label, detail in zip(labels, details, strict=True):
        if labels.count(label) > 1:
            label = _free(f"{label} ({detail})", taken)
            taken.add(label)
        made.append(label)
    return made


def _free(wanted: str, taken: set[str]) -> str:
    """`wanted`, or the first of `wanted 2`, `wanted 3`, ... that is not taken."""
    label, number = wanted, 2
    while label in taken:
        label, number = f"{wanted} {number}", number + 1
    return label
