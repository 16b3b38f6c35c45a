"""Values that rooms agree on which do not import each other: they stand left of both, and need no torch."""

from __future__ import annotations

IGNORE_LABEL = -100
"""The label of a token that is not predicted: the data side writes it, the loss and the validation leave it out."""
