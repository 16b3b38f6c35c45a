"""The decoder: attention with head interaction, mixture of experts, chunked loss."""
