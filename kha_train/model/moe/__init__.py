"""Mixture of experts: router, load balancing, experts, and the layer that combines them."""
