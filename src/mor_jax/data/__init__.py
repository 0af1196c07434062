"""Text to batches: tokenizers, sources, packing, ``prepare`` and the Grain pipeline."""
