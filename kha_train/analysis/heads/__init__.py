"""What `kha analyze` does: a look into the attention heads and learned matrices of trained checkpoints."""
