"""Decoding on a GPU by captured graphs."""
