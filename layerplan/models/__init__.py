"""Models from transformers: found by structure, frozen by plan."""
