"""One rank trains on a damaged dataset through the command and reports how it ended."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from kha_train.cli.main import run


def main() -> None:
    """argv[1]: {"overrides": [...]} as JSON, argv[2]: the result file."""
    overrides = json.loads(sys.argv[1])["overrides"]
    try:
        run(["train", *overrides])
    except SystemExit as ended:
        Path(sys.argv[2]).write_text(json.dumps(ended.code))


if __name__ == "__main__":
    main()
