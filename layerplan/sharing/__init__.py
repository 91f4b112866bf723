"""Runs that share a cluster: what each asks for, whose turn it is, and which nodes suit."""
