"""Measured figures, each with the protocol it was measured by: one file a benchmark."""

from __future__ import annotations
