"""`python -m kha_train OVERRIDES`, also under torchrun: one training run, the same as `kha train OVERRIDES`."""

from __future__ import annotations

import sys

from kha_train.interpreter import require

if __name__ == "__main__":
    require()
    from kha_train.cli.main import run

    run(["train", *sys.argv[1:]])
