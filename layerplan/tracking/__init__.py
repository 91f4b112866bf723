"""The lineage of a run: a small protocol, MLflow, JSONL."""
