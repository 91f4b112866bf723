"""A base put together from donors' layers and new ones: resolved from configs, written, looked at, reported."""
