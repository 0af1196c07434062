"""Eight fake CPU devices (MOR_TEST_PLATFORM=cuda: the GPU), strict rank promotion, one compilation cache for all."""

import logging
import os
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

_PLATFORM = os.environ.get("MOR_TEST_PLATFORM", "cpu")  # cuda, with -m gpu
os.environ["JAX_PLATFORMS"] = _PLATFORM
_FLAGS = (
    "--xla_force_host_platform_device_count=8",
    # fake devices share few threads: collectives that run in different orders on different devices wait for ever
    "--xla_cpu_enable_concurrency_optimized_scheduler=false",
    "--xla_backend_optimization_level=0",  # tests compile far longer than they compute
)
if version("jaxlib").startswith(("0.10.", "0.11.")):  # most of compiling is MLIR, kernel by kernel; 0.12 has no choice
    _FLAGS += ("--xla_cpu_use_fusion_emitters=false",)
if _PLATFORM == "cpu":
    os.environ["XLA_FLAGS"] = " ".join((os.environ.get("XLA_FLAGS", ""), *_FLAGS)).strip()

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_threefry_partitionable", True)
jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parent.parent / ".jax_cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


@pytest.fixture(autouse=True)
def package_logger() -> Iterator[None]:
    """Whoever runs the command in this process sends the package's log lines to a stderr that is soon closed."""
    logger = logging.getLogger("mor_jax")
    handlers, level, propagate = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.propagate = handlers, propagate
    logger.setLevel(level)
