"""Kernels written in Triton, each beside a plain-torch twin that says what it computes.

A kernel file holds `@jit` functions and is imported when one of them is first called; its operator file registers the
operator with torch (fake kernel, autograd), holds the twin, and needs no Triton. Triton itself enters by `language.py`.
"""
