"""Configs: pydantic only, importable in milliseconds."""
