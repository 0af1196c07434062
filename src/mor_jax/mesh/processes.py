"""Several processes as one run: how they start, agree, take turns, and read values that are spread over them."""

import itertools
import logging
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost as ocp_multihost

from mor_jax.config import DistributedConfig
from mor_jax.errors import UserError, require
from mor_jax.mesh.rollcall import ProcessPlace, roll_call

_log = logging.getLogger(__name__)
_TEXT_BYTES = 512
_SHUTDOWN_SECONDS = 60
_BARRIER_MILLISECONDS = 12 * 3600 * 1000
_barriers = itertools.count()  # every process passes the same barriers in the same order; a key serves once


def initialize(config: DistributedConfig) -> None:
    """Join the other processes of the run; does nothing for a run of one process. Call before any other use of JAX.

    Raises:
        UserError: processes stay away (names them), or are told different things.
    """
    place = find_place(config)
    if place is None:
        return
    hosts = roll_call(place, config.timeout)
    _log.info("process %d of %d on %s: all have come", place.index, place.count, hosts[place.index])
    jax.config.update("jax_enable_preemption_service", False)  # train.signals handles SIGTERM, and Ctrl-C alike
    if os.environ.get("JAX_PLATFORMS", "").startswith("cpu"):
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        # gloo joins collectives in the order in which they start: two programs must not run at once
        jax.config.update("jax_cpu_enable_async_dispatch", False)
    jax.distributed.initialize(
        place.coordinator,
        place.count,
        place.index,
        local_device_ids=place.local_devices,
        cluster_detection_method="deactivate",
        initialization_timeout=max(1, round(config.timeout)),
        shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
    )


def find_place(config: DistributedConfig) -> ProcessPlace | None:
    """Say which process this is, from the flags, then the environment, then the cluster; None for a run of one.

    Raises:
        UserError: only a part of the answer is known.
    """
    if not config.enabled:
        return None
    coordinator = config.coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS") or None
    count = config.num_processes or _environment_number("JAX_NUM_PROCESSES")
    index = config.process_id if config.process_id >= 0 else _environment_number("JAX_PROCESS_ID")
    devices = None
    if count == 1:
        return None
    if None in (coordinator, count, index):
        coordinator, count, index, devices = _ask_cluster(coordinator, count, index, config.timeout)
    known = {"coordinator": coordinator, "num_processes": count, "process_id": index}
    missing = [f"distributed.{name}" for name, value in known.items() if value is None]
    if len(missing) == len(known) or count == 1:
        return None
    if coordinator is None or count is None or index is None:
        raise UserError(f"{', '.join(missing)} not given, and no cluster tells: {known}")
    return ProcessPlace(coordinator, count, index, None if devices is None else tuple(devices))


def _environment_number(name: str) -> int | None:
    text = os.environ.get(name)
    require(text is None or text.isdecimal(), f"{name}={text!r} is not a number")
    return None if text is None else int(text)


def _ask_cluster(coordinator: str | None, count: int | None, index: int | None, timeout: float) -> Any:
    """Let JAX's cluster detection fill in what is None; it stays None outside a cluster."""
    from jax._src.clusters import ClusterEnv  # what jax.distributed.initialize asks; public only together with it

    outside_job = "JOB_COMPLETION_INDEX" not in os.environ and "TPU_WORKER_HOSTNAMES" not in os.environ
    if "KUBERNETES_SERVICE_HOST" in os.environ and outside_job and "SLURM_JOB_ID" not in os.environ:
        return coordinator, count, index, None  # a pod of its own: detection would look for its job and fail
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ClusterEnv.auto_detect_unset_distributed_params(
                coordinator, count, index, None, None, round(timeout)
            )
    except Exception as error:  # every kind of cluster fails in its own way
        raise UserError(
            f"the cluster does not say which process this is ({error}); give distributed.coordinator, num_processes "
            "and process_id, or --distributed.no-enabled for one process"
        ) from error


def is_primary() -> bool:
    """Whether this process writes what is written once."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Wait until every process is here, for hours if need be: one may be preparing data or writing pictures.

    It goes through the coordinator, not through the devices, whose collectives do not wait as long on every backend.
    """
    if jax.process_count() > 1:
        wait = ocp_multihost.get_barrier_sync_fn(processes=set(range(jax.process_count())))
        wait(key=f"mor_jax {name} {next(_barriers)}", timeout_ms=_BARRIER_MILLISECONDS)


@contextmanager
def primary_first(name: str) -> Iterator[None]:
    """Run the block in process 0, then in all others: what the first one makes, the others find."""
    if not is_primary():
        barrier(name)
    try:
        yield
    finally:
        if is_primary():
            barrier(name)


def gather_texts(text: str) -> list[str]:
    """Return the texts of all processes (cut at 512 bytes), by process id."""
    if jax.process_count() == 1:
        return [text]
    row = np.zeros(_TEXT_BYTES, np.uint8)
    encoded = np.frombuffer(text.encode()[:_TEXT_BYTES], np.uint8)
    row[: len(encoded)] = encoded
    rows = np.asarray(multihost_utils.process_allgather(row))
    return [bytes(row).rstrip(b"\0").decode(errors="replace") for row in rows]


def host_names() -> list[str]:
    """Return the name of every process's host."""
    return gather_texts(socket.gethostname())


def to_host(tree: Any) -> Any:
    """Return arrays as NumPy arrays in every process, also those that are spread over several processes."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)
