"""Makes and writes the certificate of a comparison; `verify` holds its format and checks it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from kha_train.analysis.certify import verify
from kha_train.analysis.certify.certified import Bar, Chain
from kha_train.analysis.compare import Comparison
from kha_train.analysis.report.page import DOCUMENT, FOLDER, PAGE, mark_of_report
from kha_train.checkpoint import layout
from kha_train.checkpoint.hold import held
from kha_train.record.files import check_replaceable, write_text
from kha_train.record.redact import Redactor

VERIFIER = "verify.py"
_HEADS = (b"{", b'"""Checks a certificate of `kha compare --certify`')


def chains_of(comparison: Comparison, bar: Bar) -> tuple[Chain, ...]:
    """The chain of every run. Reads every byte of records and checkpoints; `bar` shows the bytes of tensors that are
    done. Raises CheckpointError when a checkpoint is being removed, OSError when a file cannot be read.
    """
    chains = []
    for run, summary in zip(comparison.runs, comparison.summaries, strict=True):
        checkpoints = [path for _, path in layout.candidates(run.path / layout.FOLDER)]
        size = sum(file.stat().st_size for path in checkpoints for file in path.glob("*.safetensors"))
        with ExitStack() as holds, bar(f"hashing {run.label}", size) as advance:
            for path in checkpoints:
                holds.enter_context(held(path))
            links = tuple(verify.run_links(run.path, advance))
        chains.append(Chain(run.label, str(run.path), links, summary.end_state != "running"))
    return tuple(chains)


def check_certificate(out: Path, runs: Sequence[Path], option: str, overwrite: bool) -> None:
    """Before writing a certificate about `runs` in `out`: raises ConfigError, which names `option`, if a file of that
    name is not one about the same runs, unless `overwrite` is set.
    """
    check_replaceable(out / verify.CERTIFICATE, mark_of_report(runs), option, overwrite, _HEADS)
    check_replaceable(out / VERIFIER, verify.CERTIFICATE, option, overwrite, _HEADS)


def has_certificate(out: Path) -> bool:
    """Whether a certificate lies in the directory `out`."""
    return (out / verify.CERTIFICATE).exists()


def write_certificate(comparison: Comparison, out: Path) -> str:
    """Write the certificate of a certified `comparison`, whose report is in `out`, and the verifier; returns the seal,
    the SHA-256 of the last link. Call `check_certificate` first. Raises OSError.
    """
    assert comparison.certified is not None, "chains_of makes the chains of the runs"
    chains = comparison.certified.chains
    write_text(out / VERIFIER, Path(verify.__file__).read_text(encoding="utf-8"))
    figures = sorted(f"{FOLDER}/{path.name}" for path in (out / FOLDER).iterdir() if path.is_file())
    facts = _facts(comparison, [PAGE, DOCUMENT, *figures, VERIFIER])
    report = verify.report_links(out, facts, [chain.head for chain in chains], facts["files"])
    certificate = {
        "format": verify.FORMAT,
        "facts": facts,
        "runs": [list(chain.links) for chain in chains],
        "report": report,
        "seal": report[-1]["sha256"],
    }
    write_text(out / verify.CERTIFICATE, json.dumps(certificate, indent=1, allow_nan=False) + "\n")
    return str(certificate["seal"])


def _facts(comparison: Comparison, files: Sequence[str]) -> dict[str, Any]:
    """All figures of the certificate, without secrets, as they are read back from JSON."""
    paths = [run.path.resolve() for run in comparison.runs]
    common = os.path.commonpath([path.parent for path in paths])
    facts = {
        "tool": f"kha_train {metadata.version('kha_train')}",
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "mark": mark_of_report([run.path for run in comparison.runs]),
        "runs": [
            {"label": run.label, "path": str(path), "place": os.path.relpath(path, common)}
            for run, path in zip(comparison.runs, paths, strict=True)
        ],
        "pairs": [
            {
                "reference": pair.reference,
                "other": pair.other,
                "first_step": pair.first_step,
                "last_step": pair.last_step,
                "difference": pair.difference.mean if pair.difference else None,
            }
            for pair in comparison.pairs
        ],
        "report": comparison.to_dict(),
        "files": list(files),
    }
    found: dict[str, Any] = json.loads(json.dumps(Redactor.from_environment().clean(facts), allow_nan=False))
    return found
