"""Saying which kernel computes an operation."""

import functools
import logging

_log = logging.getLogger(__name__)


@functools.cache
def log_kernel(operation: str, kernel: str) -> None:
    """Log once what computes an operation."""
    _log.info("kernel, %s: %s", operation, kernel)
