"""Datasets on disk: reading and writing manifests, shards and checksums."""
