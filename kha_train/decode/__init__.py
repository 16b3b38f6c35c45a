"""Uses a trained decoder without its trainer: absorbs its interaction, generates with a cache."""
