"""What a variant or an optimiser says about itself: options, counts, registry. No torch, and nothing of a run."""
