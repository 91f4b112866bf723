"""Figures and the page of a run, from its artifacts on disk."""
