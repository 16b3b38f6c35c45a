"""Section: where the runs come from: code, versions, machine, data, directories."""

from __future__ import annotations

from kha_train.analysis.history import DATA_ID, VALIDATION_ID, brief
from kha_train.analysis.report.content import Block, Row, Section, Text
from kha_train.analysis.report.context import Context
from kha_train.analysis.runs import RunData
from kha_train.config.build import flatten

SHOWN = (
    "git.commit", "git.dirty", "device", "dtype", "attention_backend", "peak", "host", "python", DATA_ID, VALIDATION_ID,
)  # fmt: skip
"""Facts shown in full, beside the versions of all packages and the command."""


def section(context: Context) -> Section:
    """The provenance of every run, its directory, and what was left out."""
    facts = [_facts(run) for run in context.runs]
    versions = sorted({key for one in facts for key in one if key.startswith("versions.")})
    rows = [Row("run id", tuple(str(run.run.get("run_id", "-"))[:12] for run in context.runs))]
    rows.append(Row("seed", tuple("-" if run.seed is None else str(run.seed) for run in context.runs)))
    for key in (*SHOWN, *versions):
        values = tuple("-" if one.get(key) is None else brief(one[key]) for one in facts)
        if set(values) != {"-"}:
            rows.append(Row(key, values, code=True))
    blocks: list[Block] = [context.run_table(rows)]
    blocks += [Text(f"{run.label}: {run.path}") for run in context.runs]
    blocks += [Text(f"Skipped: {words}.") for words in context.comparison.passed_over]
    return Section("provenance", "Provenance", tuple(blocks))


def _facts(run: RunData) -> dict[str, object]:
    """The facts of the attempt that made the last line, over those of the first start."""
    return {**flatten(run.run.get("provenance", {})), **run.stretches[-1].facts}
