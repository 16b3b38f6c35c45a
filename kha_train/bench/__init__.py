"""Benchmarks, one file each. Every figure comes with its measurement protocol."""

from __future__ import annotations
