"""Tools that make training data: corpus, tokenizer, shards."""
