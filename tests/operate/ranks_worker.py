"""One rank of a training run: the configuration and the last step come from the test."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from kha_train.config.compose import from_plain
from kha_train.train.run import train


def main(config: dict[str, Any], until: int) -> int:
    """Train `config` until the end of step `until`; returns the step that was reached."""
    return train(from_plain(config), until=until).step


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(main(**json.loads(sys.argv[1]))))
