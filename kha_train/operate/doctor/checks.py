"""One line of `kha doctor`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

State = Literal["OK", "WARN", "FAIL"]
"""`OK`: nothing to do. `WARN`: training works, but something is absent, slow or unusual. `FAIL`: the configuration
cannot be trained here."""


@dataclass(frozen=True)
class Check:
    """What was `found` about `name`, a part of `topic`. Every line that is not OK says in `fix` what to type or do."""

    topic: str
    name: str
    state: State
    found: str
    fix: str = ""

    def __post_init__(self) -> None:
        assert self.fix or self.state == "OK", self

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)
