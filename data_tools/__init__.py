"""From text to shards: building a corpus, training a tokenizer, encoding, and a synthetic source for tests."""
