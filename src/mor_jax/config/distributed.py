"""How the processes of one run find each other."""

from dataclasses import dataclass

from mor_jax.errors import require


@dataclass(frozen=True)
class DistributedConfig:
    """Which process of a run this one is; on TPU pods, GKE, Slurm and Open MPI it is found out.

    Not saved with the run: it says where a process stands, never what the run computes.
    """

    enabled: bool = True
    """False: one process, even on a host that belongs to a cluster."""
    coordinator: str = ""
    """host:port of process 0; empty takes JAX_COORDINATOR_ADDRESS, or what the cluster says."""
    num_processes: int = 0
    """Processes of the run; 0 takes JAX_NUM_PROCESSES, or what the cluster says."""
    process_id: int = -1
    """This process, from 0; -1 takes JAX_PROCESS_ID, or what the cluster says."""
    timeout: float = 300.0
    """Seconds to wait for all processes; those that stay away are named."""

    def __post_init__(self) -> None:
        require(self.timeout > 0, f"distributed.timeout={self.timeout} must be positive")
        require(self.num_processes >= 0, f"distributed.num_processes={self.num_processes} must not be negative")
        require(self.process_id >= -1, f"distributed.process_id={self.process_id} must not be negative")
