"""Checkpoints that need no pickle and fit any world size and ZeRO stage. `docs/checkpoints.md` describes the format."""
