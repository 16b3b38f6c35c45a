"""Tools around a training run: rehearsals, sweeps (local and on SLURM), status, the quickstart."""
