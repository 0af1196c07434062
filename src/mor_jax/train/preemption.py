"""One process is asked to stop, and all stop after the same step."""

import signal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mor_jax.mesh.mesh import replicated
from mor_jax.train.signals import StopRequest


class StopVote:
    """A vote after every step: does any process have a ``StopRequest``?

    The vote is one more tiny program behind the step, the largest of one number per device, and its result is read a
    step later: the host waits for nothing that it would not wait for anyway, and every process reads the same answer at
    the same step. A run of one process answers at once.

    Args:
        request: of this process.
        mesh: of the run.
    """

    def __init__(self, request: StopRequest, mesh: Mesh) -> None:
        self._request = request
        self._alone = jax.process_count() == 1
        self._shape = (mesh.size,)
        self._sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._largest = jax.jit(jnp.max, out_shardings=replicated(mesh))
        self._pending: jax.Array | None = None

    def cast(self) -> str:
        """Vote, and return the outcome of the previous vote: the name of the signal that came anywhere, or ""."""
        if self._alone:
            return self._request.requested
        mine = signal.Signals[self._request.requested].value if self._request.requested else 0
        votes = jax.make_array_from_callback(self._shape, self._sharding, lambda _: np.full((1,), mine, np.int32))
        previous, self._pending = self._pending, self._largest(votes)
        outcome = 0 if previous is None else int(previous)
        return signal.Signals(outcome).name if outcome else ""
