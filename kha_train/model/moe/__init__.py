"""Mixture of experts: router, balance of loads, experts, and the layer that joins them."""
