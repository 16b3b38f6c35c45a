"""The error of this room, which knows none of the trainer's."""

from __future__ import annotations


class HeadsError(ValueError):
    """A model, an option or a file that heads cannot be inserted into, folded into or read from: one line that says
    what is wrong and what would be right.
    """
