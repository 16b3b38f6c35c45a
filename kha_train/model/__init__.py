"""The decoder: attention with its head interaction, mixture of experts, chunked loss."""
