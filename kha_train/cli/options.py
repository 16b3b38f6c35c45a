"""Options in the style of other programs: `--steps 100` is refused, and `run.steps=100` is suggested. Options that are
lists of integers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from typer.core import TyperCommand

from kha_train.config import aliases
from kha_train.config.compose import override_for
from kha_train.errors import ConfigError, Replace


class OverridesCommand(TyperCommand):
    """A command that takes overrides. An unknown option that names a setting is refused with the override to type."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As Typer's. Raises ConfigError for an unknown option that names a setting."""
        for at in self._unknown(args):
            _refuse(args[at:])
        return super().parse_args(ctx, args)

    def _unknown(self, args: Sequence[str]) -> Iterator[int]:
        """Positions in `args` of options that the command does not have."""
        known = {name: option for option in self.params for name in (*option.opts, *option.secondary_opts)}
        taken = False
        for at, text in enumerate(args):
            name, equals, _ = text.partition("=")
            if text == "--":
                return
            if not taken and text.startswith("-") and name not in (*known, "-h", "--help"):
                yield at
            taken = not taken and name in known and not equals and not getattr(known[name], "is_flag", True)


def integers(text: str, option: str, least: int = 1, most: int = 10**9) -> list[int]:
    """The integers that `text` lists, separated by commas. Raises ConfigError for anything else, and outside of the
    range.
    """
    words = text.split(",")
    if not all(word.strip().isdecimal() and len(word) < 20 and least <= int(word) <= most for word in words):
        allowed = f"integers from {least:,} to {most:,}, separated by commas"
        raise ConfigError("not a list of such integers", field=option, value=text, allowed=allowed)
    return [int(word) for word in words]


def _refuse(args: Sequence[str]) -> None:
    """Raises ConfigError with the override to type when the option `args[0]` names a setting."""
    name, equals, value = args[0].partition("=")
    bare = name.lstrip("-").replace("-", "_")
    typed = args[0]
    if not equals and len(args) > 1 and not args[1].startswith("-") and "=" not in args[1]:
        value = args[1]
        typed = f"{typed} {value}"
    meant = override_for(bare, value) if value else None
    fix = Replace(meant, old=typed) if meant else aliases.advice(bare)
    if fix is None and (meant := override_for(bare, "VALUE")):
        fix = meant
    if fix:
        raise ConfigError("no such option; write settings as KEY=VALUE", field=name, fix=fix)
