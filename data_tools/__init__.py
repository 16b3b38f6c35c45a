"""From text to shards: the corpus, the tokenizer's training, the encoding, and a synthetic source for tests."""
