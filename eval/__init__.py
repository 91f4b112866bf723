"""Scores and verdicts: benchmarks, prompts, protocols, engines, significance."""
