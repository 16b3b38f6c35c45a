"""Analysis of runs: comparison, statistics, the report."""

from __future__ import annotations
