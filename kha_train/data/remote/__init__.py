"""Datasets in an object store, with a local cache of their blocks."""
