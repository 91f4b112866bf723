"""Layer measurements: LayerTracer and SALF on a pool of model replicas."""
