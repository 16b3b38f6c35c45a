"""What variants and optimisers declare about themselves: options, counts, registry. No torch, and nothing about a
run.
"""
