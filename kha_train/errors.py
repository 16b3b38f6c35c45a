"""Mistakes of users: `KhaError` and its kinds, each with the exit code that the command ends with."""

from __future__ import annotations

import re
from typing import Any, Self

from kha_train.literal import visible


class Typed(str):
    """A fix whose part `typed` can be typed exactly as it stands; the subclass says where. As a string, it is what the
    user reads.

    A fix that is a plain string is advice in words. A test runs every typed fix (tests/architecture/test_fixes.py).
    """

    typed: str
    shown: str

    def __new__(cls, typed: str, shown: str = "{}") -> Self:
        """The fix `typed`, shown as `shown` with `{}` replaced by it."""
        fix = super().__new__(cls, shown.replace("{}", typed))
        fix.typed, fix.shown = typed, shown
        return fix

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as plain text, because `__new__` would format it a second time."""
        return str.__new__, (type(self), str(self)), vars(self)


class Settings(Typed):
    """Overrides, separated by spaces: each replaces the override of the same key, or is added."""

    def __new__(cls, typed: str, shown: str = "{}") -> Self:
        """As `Typed`; lists are quoted, because some shells would expand them as file patterns."""
        return super().__new__(cls, re.sub(r"(?<!\S)[\w.]+=\[[^\s'\"]*\](?!\S)", r"'\g<0>'", typed), shown)


class Options(Typed):
    """Options that are added to the refused command."""


class Instead(Typed):
    """A shell command to type instead of the refused one."""


class Look(Typed):
    """A shell command that lists what there is to choose from."""

    def __new__(cls, typed: str, shown: str = "see `{}`") -> Self:
        """As `Typed`."""
        return super().__new__(cls, typed, shown)


class First(Typed):
    """A shell command to type first. After it the refused command works."""

    def __new__(cls, typed: str, shown: str = "type `{}` first") -> Self:
        """As `Typed`."""
        return super().__new__(cls, typed, shown)


class Replace(Typed):
    """What to type instead of `old`: whole words of the command, or a key or value."""

    old: str

    def __new__(cls, typed: str, shown: str = "{}", *, old: str) -> Self:
        """As `Typed`."""
        fix = super().__new__(cls, typed, shown)
        fix.old = old
        return fix


class Ways(str):
    """Several fixes, any of which is enough."""

    ways: tuple[str, ...]


def either(*ways: str) -> Ways:
    """The fix that offers all `ways`: typed fixes and advice in words."""
    separator = " or " if all(isinstance(way, Typed) for way in ways) else ", or "
    fix = Ways(separator.join(ways))
    fix.ways = ways
    return fix


def tag(code: str) -> str:
    """The end of a message that has an entry in docs/errors.md: ` [E03]`; "" without a code."""
    return f" [{code}]" if code else ""


def between(first: int, last: int) -> str | None:
    """`allowed` for an integer: the range in words, None where it is empty."""
    if last <= first:
        return str(first) if last == first else None
    return f"{first} to {last}"


class KhaError(Exception):
    """A mistake outside the program, described in one line: what is wrong, what is allowed, how to fix it.

    `field` names the configuration key or the file, `value` what was found there, `allowed` what would be accepted,
    `fix` what to type or change, `code` its entry in docs/errors.md, if it has one. `str(error)` is the line that users
    see, without the code. It shows only the parts that are given, and no part can send control codes to a terminal.
    """

    exit_code = 1
    kind = ""
    fatal = True
    """Whether the same command would fail the same way. If so, the run is marked FATAL and is not restarted
    automatically.
    """
    agreed = False
    """True when all ranks raise this error together, so that printing it once is enough."""

    def __init__(
        self,
        problem: str,
        *,
        field: str | None = None,
        value: Any = None,
        allowed: str | None = None,
        fix: str | None = None,
        code: str = "",
    ) -> None:
        self.problem, self.field, self.value, self.allowed, self.fix = problem, field, value, allowed, fix
        self.code = code
        name = None if field is None else visible(field)
        where = "" if name is None else f"{name}: " if value is None else f"{name} = {value!r}: "
        text = f"{where}{problem}"
        text += f"; allowed: {allowed}" if allowed else ""
        text += f"; fix: {fix}" if fix else ""
        super().__init__(visible(text, keep="\n"))

    @property
    def typed_fixes(self) -> tuple[Typed, ...]:
        """The fixes that can be typed as they stand, in the order they appear in the line."""
        ways = self.fix.ways if isinstance(self.fix, Ways) else (self.fix,)
        return tuple(way for way in ways if isinstance(way, Typed))

    def line(self) -> str:
        """The one line printed before the command ends with `exit_code`."""
        return f"{self.kind} error: {self}{tag(self.code)}".lstrip()


class ConfigError(KhaError):
    """A configuration that cannot run: unknown key, wrong type, impossible combination, missing directory."""

    exit_code = 2
    kind = "configuration"


class ResumeError(KhaError):
    """A checkpoint that does not fit this configuration."""

    exit_code = 3
    kind = "resume"


class DataError(KhaError):
    """Shards that are damaged or do not match their manifest. Names shard, offset, expected and found."""

    exit_code = 4
    kind = "data"


class CheckpointError(KhaError):
    """A checkpoint that is damaged or does not match its manifest."""

    exit_code = 4
    kind = "checkpoint"


class ExportError(KhaError):
    """An export that does not compute what the checkpoint computes."""

    exit_code = 4
    kind = "export"


class FormatError(CheckpointError):
    """A checkpoint whose format this version does not know. It is not damaged and is left untouched."""

    exit_code = 3


class DivergedError(KhaError):
    """The run diverged: loss or gradients were not finite, or the loss was far too high, for longer than the policy
    allows.
    """

    exit_code = 5
    kind = "divergence"


class RunDirectoryInUse(KhaError):
    """Another live process owns the run directory."""

    exit_code = 6
    kind = "run directory"


class HangError(KhaError):
    """A rank stopped responding: try again."""

    exit_code = 75
    kind = "hang"
    fatal = False


class MachineError(KhaError):
    """The machine failed, not the run (a full or unreadable disk, too little host memory): try again."""

    exit_code = 75
    kind = "machine"
    fatal = False


class CorruptionError(MachineError):
    """Values that must be equal on all ranks differ: a machine computes wrongly or has faulty memory."""


class RankError(KhaError):
    """Another rank failed because of a bug; see the traceback of that rank."""

    kind = "rank"
    fatal = False
