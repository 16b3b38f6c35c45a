"""From shards on disk to batches of token ids; `stream.py` shows how the parts fit together."""
