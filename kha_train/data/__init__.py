"""From shards on disk to batches of token ids: see `stream.py` for the way the parts meet."""
