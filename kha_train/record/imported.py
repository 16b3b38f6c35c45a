"""What a run of imported weights holds in the place of data: where the weights come from, and the model's tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path

IMPORTED = "import.json"
"""The file in a run directory that says which model of others its weights were imported from."""
TOKENIZER = "tokenizer.json"
NAMING = ("tokenizer_config.json", "special_tokens_map.json")
"""The files beside a tokenizer.json that name its special tokens."""


def copy_imported(run: Path, made: Path) -> None:
    """Copy these files to the run `made` of weights of `run`. Nothing, unless `run` was imported. Raises OSError."""
    if (run / IMPORTED).is_file():
        for name in (IMPORTED, TOKENIZER, *NAMING):
            if (run / name).is_file():
                shutil.copyfile(run / name, made / name)
