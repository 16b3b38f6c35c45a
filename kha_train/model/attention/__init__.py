"""Attention = a base (`grouped_query`) x an interaction (`knocking`), computed by one backend."""
