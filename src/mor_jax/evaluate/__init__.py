"""Validation losses, routing analysis and the pictures of a run."""
