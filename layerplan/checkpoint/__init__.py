"""Checkpoints: layout, distributed saving and loading, Hugging Face export."""
