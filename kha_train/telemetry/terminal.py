"""Terminals that print every text literally: no markup, no emoji codes, nothing that a terminal would obey."""

from __future__ import annotations

import os
from typing import Any

from rich.console import Console
from rich.text import Text

from kha_train.literal import LINES, visible


class LiteralConsole(Console):
    """A rich console to which `[/red]`, `:smile:` and escape sequences are text, in cells of tables too."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"markup": False, "emoji": False, "highlight": False, **options})

    def render_str(self, text: str, **options: Any) -> Text:
        """As rich's, for the text with everything made visible."""
        return super().render_str(visible(text, LINES), **options)


def table_console() -> LiteralConsole:
    """The console for a table: as wide as the terminal, and wide enough for most tables in a file or pipe."""
    console = LiteralConsole()
    return console if console.is_terminal or "COLUMNS" in os.environ else LiteralConsole(width=200)


def literal(text: object, style: str = "") -> Text:
    """`text` in a style, for any console to print literally."""
    return Text(visible(str(text), LINES), style)
