"""What people run around a training run: plans, rehearsals, sweeps here and on SLURM, status, the quickstart."""
