"""What a user can do wrong: `KhaError` and its kinds, each with the exit code the command ends with."""

from __future__ import annotations

from typing import Any

from kha_train.literal import visible


class KhaError(Exception):
    """A mistake outside the program, told in one line: what is wrong, what is allowed, how to mend it.

    `field` names the configuration key or the file, `value` what was found there, `allowed` what would have been
    accepted, `fix` what to type or change. `str(error)` is the line a user sees; only the parts given are shown, and
    none of them can steer a terminal.
    """

    exit_code = 1
    kind = ""
    fatal = True
    """Whether the same command would end the same way: then the run is marked FATAL, and not started again unseen."""
    agreed = False
    """True when all ranks raise this error together, so that one of them is enough to tell it."""

    def __init__(
        self,
        problem: str,
        *,
        field: str | None = None,
        value: Any = None,
        allowed: str | None = None,
        fix: str | None = None,
    ) -> None:
        self.problem, self.field, self.value, self.allowed, self.fix = problem, field, value, allowed, fix
        name = None if field is None else visible(field)
        where = "" if name is None else f"{name}: " if value is None else f"{name} = {value!r}: "
        text = f"{where}{problem}"
        text += f"; allowed: {allowed}" if allowed else ""
        text += f"; fix: {fix}" if fix else ""
        super().__init__(visible(text, keep="\n"))

    def line(self) -> str:
        """The one line printed before the command ends with `exit_code`."""
        return f"{self.kind} error: {self}".lstrip()


class ConfigError(KhaError):
    """A configuration that cannot run: unknown key, wrong type, impossible combination, missing directory."""

    exit_code = 2
    kind = "configuration"


class ResumeError(KhaError):
    """A checkpoint that does not belong to this configuration."""

    exit_code = 3
    kind = "resume"


class DataError(KhaError):
    """Shards that are damaged or are not what their manifest says. Names shard, offset, expected and found."""

    exit_code = 4
    kind = "data"


class CheckpointError(KhaError):
    """A checkpoint that is damaged or is not what its manifest says."""

    exit_code = 4
    kind = "checkpoint"


class FormatError(CheckpointError):
    """A checkpoint of a format that this version does not know. It is not damaged, and nothing touches it."""

    exit_code = 3


class DivergedError(KhaError):
    """Training left the finite numbers, or the loss left all reason, for longer than the policy allows."""

    exit_code = 5
    kind = "divergence"


class RunDirectoryInUse(KhaError):
    """Another live process owns the run directory."""

    exit_code = 6
    kind = "run directory"


class HangError(KhaError):
    """A rank stopped answering: try again."""

    exit_code = 75
    kind = "hang"
    fatal = False


class MachineError(KhaError):
    """The machine failed and not the run (a full or unreadable disk, too little host memory): try again."""

    exit_code = 75
    kind = "machine"
    fatal = False


class CorruptionError(MachineError):
    """What all ranks hold in common differs: a machine computes or remembers wrongly."""


class RankError(KhaError):
    """Another rank died of a defect, of which its own traceback tells."""

    kind = "rank"
    fatal = False
