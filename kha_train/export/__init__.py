"""What is done with a trained model: absorb its interaction, generate from it."""
