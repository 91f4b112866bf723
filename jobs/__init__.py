"""Thin entry points: each puts stages in order; nothing here is shipped to a worker."""
