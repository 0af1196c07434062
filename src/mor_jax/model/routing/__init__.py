"""Routing, what the paper is about: router, selection, capacities, trace, and the executions `gather` and `scan`."""
