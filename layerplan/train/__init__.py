"""Training: the pure step, the loop, placement on workers, and the Ray Train run."""
