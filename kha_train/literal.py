"""Shows foreign text safely: whatever a terminal or a page would obey or hide is made visible.

Names of runs, files and settings come from other people. An escape sequence in one could repaint a terminal, a carriage
return could overwrite the line, a bidirectional override could show a path backwards.
"""

from __future__ import annotations

import sys
from unicodedata import category

LINES = "\n\t"
"""Control characters allowed in text of several lines."""


def visible(text: str, keep: str = "") -> str:
    r"""`text` with every non-printing character replaced by its Python escape: ESC becomes `\x1b`, an override of the
    writing direction `\u202e`, a lone surrogate `\ud800`. Characters in `keep` and spaces of every width are unchanged.
    """
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() or one in keep or category(one) == "Zs" else _escape(one) for one in text)


def say(text: str, err: bool = False) -> None:
    """Print `text` literally, followed by a line break, on standard output or standard error."""
    print(visible(text, LINES), file=sys.stderr if err else sys.stdout, flush=True)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
