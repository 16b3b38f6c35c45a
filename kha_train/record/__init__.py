"""The record of a run, in plain Python: `metrics.jsonl`, `events.jsonl`, `run.json` and the marker files.

Console and W&B mirror what is written here; comparison, resume and tests read nothing else.
"""

from __future__ import annotations

from kha_train.record.attempts import Attempt, config_of, read_attempts
from kha_train.record.failures import first_failure, first_failure_line
from kha_train.record.lock import heartbeat_age, read_owner
from kha_train.record.markers import (
    Marker,
    clear_marker,
    has_marker,
    leave_outcome,
    mark_fatal,
    read_marker,
    set_marker,
)
from kha_train.record.metrics import declared_in, timing_keys
from kha_train.record.reader import (
    read_discarded,
    read_events,
    read_last_metrics,
    read_metrics,
    read_metrics_at,
    read_run,
)
from kha_train.record.record import Record, SilentRecord
from kha_train.record.redact import Redactor

__all__ = [
    "Attempt",
    "Marker",
    "Record",
    "Redactor",
    "SilentRecord",
    "clear_marker",
    "config_of",
    "declared_in",
    "first_failure",
    "first_failure_line",
    "has_marker",
    "heartbeat_age",
    "leave_outcome",
    "mark_fatal",
    "read_attempts",
    "read_discarded",
    "read_events",
    "read_last_metrics",
    "read_marker",
    "read_metrics",
    "read_metrics_at",
    "read_owner",
    "read_run",
    "set_marker",
    "timing_keys",
]
