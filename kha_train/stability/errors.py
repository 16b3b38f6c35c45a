"""What can be wrong with a file that should hold a curve."""

from __future__ import annotations


class CurveError(ValueError):
    """A file that is not a curve, or has no one curve: its kind, its columns, its axis.

    `field` is the place: a path, with the line or item. `value` was seen there, `allowed` would do, `fix` is what to
    do. Each is empty where there is nothing to say.
    """

    def __init__(self, problem: str, field: str, value: object = None, allowed: str = "", fix: str = "") -> None:
        self.problem, self.field, self.value, self.allowed, self.fix = problem, field, value, allowed, fix
        parts = [f"{field}: {problem}"]
        parts += [] if value is None else [f"got {value!r}"]
        parts += [f"allowed: {allowed}"] if allowed else []
        super().__init__("; ".join([*parts, fix] if fix else parts))


class DamagedCurveError(CurveError):
    """A file of a known kind with content that cannot be read."""
