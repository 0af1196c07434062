"""Inference: causal decoding over paged caches and the depth-wise batching engine (paper sections 2.2.2, 3.4)."""
