"""Rows of equal length cut from documents, and the batches made of them."""
