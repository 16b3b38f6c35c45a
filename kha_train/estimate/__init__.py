"""Parameters, FLOPs, memory, traffic and time of a run, from its configuration alone: no torch, no engine."""
