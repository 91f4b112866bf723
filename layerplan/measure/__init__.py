"""Rivals of the tracer: numbers per layer that others choose layers by, measured on a pool of actors."""
