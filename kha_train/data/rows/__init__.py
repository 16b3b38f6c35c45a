"""Rows of equal length cut from documents, and the batches built from them."""
