"""Verifies an export: another process, which cannot import the trainer, loads it and compares it with ours."""

# B rows   T tokens

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch

from kha_train.errors import ExportError
from kha_train.export import hugging_face
from kha_train.export.reference import Reference

TOLERANCE = 1e-5
"""The largest difference of logits, times the largest logit if that is above 1."""
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


class Text(NamedTuple):
    """Lines of text and our ids of each; empty without a tokenizer."""

    lines: Sequence[str] = ()
    ids: Sequence[Sequence[int]] = ()


def verify(directory: Path, reference: Reference, text: Text) -> dict[str, Any]:
    """What another process found of the export in `directory`, for its report. Raises ExportError when logits or ids
    differ from ours, or it cannot be loaded.
    """
    with TemporaryDirectory(prefix="kha-verify-") as place:
        request = Path(place)
        np.save(request / "tokens.npy", reference.tokens_BT.numpy())
        np.save(request / "logits.npy", reference.logits_BTV.numpy())
        asked = {
            "directory": str(directory.resolve()),
            "lines": list(text.lines),
            "ids": [list(ids) for ids in text.ids],
        }
        (request / hugging_face.REQUEST).write_text(json.dumps(asked))
        answer = _ask(request)
    if answer["trainer"] != "cannot be imported":
        raise ExportError(f"its verification is worthless: there {answer['trainer']}", field="--out")
    return {
        "process": {"class": answer["class"], "trainer": answer["trainer"], "versions": answer["versions"]},
        "logits": _logits(answer["difference"], reference),
        "tokenizer": _tokenizer(answer.get("tokenizer"), len(text.lines)),
    }


def _ask(request: Path) -> dict[str, Any]:
    """The answer of a fresh interpreter, which has nothing of this one but its packages."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    ended = subprocess.run(
        [sys.executable, "-I", "-B", str(Path(hugging_face.__file__).resolve()), str(request)],
        env={**kept, **OFFLINE},
        cwd=request,
        capture_output=True,
        text=True,
        check=False,
    )
    answer = request / hugging_face.ANSWER
    if ended.returncode != 0 or not answer.is_file():
        last = (ended.stderr.strip().splitlines() or [f"it ended with {ended.returncode}"])[-1]
        raise ExportError(f"transformers cannot load it: {last[:500]}", field="--out")
    found: dict[str, Any] = json.loads(answer.read_text())
    return found


def _logits(difference: list[list[float]], reference: Reference) -> dict[str, Any]:
    """Raises ExportError unless all tokens that decide agree."""
    difference_BT, decided_BT = torch.tensor(difference), reference.decided_BT
    if not decided_BT.any():
        problem = "no token can be compared: two experts nearly tie at the first token of every row"
        raise ExportError(problem, field="--out", fix="export another checkpoint; the run is as it was")
    largest = float(reference.logits_BTV.abs().max())
    tolerance = TOLERANCE * max(1.0, largest)
    # A difference that is not a number is no agreement.
    wrong_BT = decided_BT & ~(difference_BT <= tolerance)
    worst = float(difference_BT[decided_BT].max())
    if wrong_BT.any():
        row, token = divmod(int(wrong_BT.flatten().float().argmax()), wrong_BT.shape[1])
        raise ExportError(
            f"its logits differ from ours by up to {worst:.3g}, first at token {token} of row {row}",
            field="--out",
            allowed=f"{tolerance:.3g}",
            fix="report it as a fault of the export; the run is as it was",
        )
    return {
        "rows": decided_BT.shape[0],
        "tokens": decided_BT.numel(),
        "compared": int(decided_BT.sum()),
        "after_a_near_tie_of_experts": int((~decided_BT).sum()),
        "largest_difference": worst,
        "largest_logit": largest,
        "tolerance": tolerance,
    }


def _tokenizer(found: Mapping[str, Any] | None, lines: int) -> dict[str, Any] | None:
    """Raises ExportError for a line with other ids, or whose text does not come back."""
    if found is None:
        return None
    for fault, words in (("other_ids", "has other ids"), ("other_text", "does not come back from its ids")):
        if found[fault]:
            problem = f"its tokenizer differs: {len(found[fault])} of {lines} lines; one {words}"
            raise ExportError(problem, field="tokenizer.json", value=found[fault][0][:80])
    return {"class": found["class"], "lines": lines, "with_other_ids": 0, "with_other_text": 0}
