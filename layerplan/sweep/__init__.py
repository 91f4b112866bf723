"""Boundary sweeps with Ray Tune."""
