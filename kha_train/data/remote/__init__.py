"""Datasets in an object store, and the local cache of their blocks."""
