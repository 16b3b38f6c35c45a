"""Datasets on disk: manifest, shards and their checksums, written and read."""
