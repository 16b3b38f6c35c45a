"""Triton kernels, each beside a plain-torch reference.

A kernel file holds `@jit` functions and is imported when one of them is first called. Its operator file registers the
operator with torch (fake kernel, autograd), holds the reference, and needs no Triton. Triton itself is imported only by
`language.py`.
"""
