"""Checkpoints free of pickle, world size and ZeRO stage. `docs/checkpoints.md` tells the format."""
