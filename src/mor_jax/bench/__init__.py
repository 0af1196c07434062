"""Benchmarks of what users run: the train step itself, one process per case, ratios within one run."""
