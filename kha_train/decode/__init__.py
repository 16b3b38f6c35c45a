"""A trained decoder without its trainer: absorb its interaction, generate with a cache."""
