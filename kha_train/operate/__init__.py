"""What people run around a training run: the quickstart and, later, planning and sweeps."""
