"""What is measured of a model while it trains: tasks, each with batches, scores and what it declares to the record."""
