"""Freeze plans as values: policies, cost, explanation. Pure Python."""
