"""Whether a cluster is fit for a run, asked of every node before anything is placed on it."""
