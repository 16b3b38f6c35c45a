"""Foreign text reaches a terminal or a page as text, never as control codes."""

from __future__ import annotations

import io
import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from kha_train.errors import ConfigError, KhaError
from kha_train.literal import visible
from kha_train.telemetry.terminal import LiteralConsole, literal


@given(st.text() | st.text(st.characters(categories=("Cc", "Cf", "Cs"))))
def test_nothing_that_a_terminal_obeys_is_left_and_what_prints_is_untouched(text: str) -> None:
    shown = visible(text)
    assert {unicodedata.category(one) for one in shown}.isdisjoint({"Cc", "Cf", "Cs", "Zl", "Zp"})
    shown.encode("utf-8")
    if text.isprintable():
        assert shown == text


def test_the_escapes_are_those_of_python() -> None:
    assert visible("a\x1b[2J\a\rb\u202ec\x9b\ud800") == r"a\x1b[2J\x07\rb\u202ec\x9b\ud800"
    assert visible("grüße 表\u00a0x") == "grüße 表\u00a0x"
    assert visible("a\nb\t\r", keep="\n\t") == "a\nb\t\\r"


def test_an_error_shows_what_it_names_literally() -> None:
    error = ConfigError("no \x1b[31mred\n  table", field="a\nb\r", value="\x1b", allowed="\u202e", fix="\a")
    assert str(error) == "a\\nb\\r = '\\x1b': no \\x1b[31mred\n  table; allowed: \\u202e; fix: \\x07"
    assert str(KhaError("\udcff")) == r"\udcff"


def test_a_literal_console_knows_neither_markup_nor_emoji_nor_escape_sequences() -> None:
    from rich.table import Table

    out = io.StringIO()
    console = LiteralConsole(file=out, width=120)
    table = Table("[bold]h", ":smile:")
    table.add_row("a[/red]b", "\x1b]0;title\a")
    console.print(table)
    console.print("x[/]y \x1b[2J", literal("[red]\r"))
    shown = out.getvalue()
    for text in ("[bold]h", ":smile:", "a[/red]b", r"\x1b]0;title\x07", r"x[/]y \x1b[2J", r"[red]\r"):
        assert text in shown
    assert "\x1b" not in shown and "\r" not in shown
