"""What people run around a training run: rehearsals, sweeps here and on SLURM, status, the quickstart."""
