"""Where a run keeps its files: a local folder, or a bucket with a working folder in front of it."""
