"""A damaged validation row that only the second rank reads; answers what each rank is told."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from kha_train import compose
from kha_train.errors import DataError
from kha_train.train.run import train

if __name__ == "__main__":
    told = ""
    try:
        train(compose(json.loads(sys.argv[1])["overrides"]))
    except DataError as error:
        told = str(error)
    Path(sys.argv[2]).write_text(json.dumps(told))
