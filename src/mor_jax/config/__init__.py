"""Frozen configuration dataclasses with cross-field checks (paper sections 2 and 3, tables 3, 6 and 13 to 15).

``Config`` is the root that a run saves beside its checkpoints. ``ModelConfig`` holds everything that changes what the
model computes; ``PerfConfig`` only how it is executed, so it may differ between training and restoring.
"""

from mor_jax.config.distributed import DistributedConfig
from mor_jax.config.execution import (
    AttentionBackend,
    Execution,
    Fusion,
    LogitsDtype,
    MeshConfig,
    PerfConfig,
    Remat,
)
from mor_jax.config.model import (
    Dtype,
    ModelConfig,
)
from mor_jax.config.recursion import (
    Balancing,
    GateResidual,
    Gating,
    KvStrategy,
    LoraTarget,
    RecursionConfig,
    RelaxationConfig,
    RouterKind,
    RoutingConfig,
    RoutingKind,
    Sampling,
    ScoreFunction,
    Sharing,
)
from mor_jax.config.training import (
    Config,
    DataConfig,
    InitConfig,
    InitStrategy,
    OptimizerConfig,
    TrainConfig,
)

__all__ = [
    "AttentionBackend",
    "Balancing",
    "Config",
    "DataConfig",
    "DistributedConfig",
    "Dtype",
    "Execution",
    "Fusion",
    "GateResidual",
    "Gating",
    "InitConfig",
    "InitStrategy",
    "KvStrategy",
    "LogitsDtype",
    "LoraTarget",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PerfConfig",
    "RecursionConfig",
    "RelaxationConfig",
    "Remat",
    "RouterKind",
    "RoutingConfig",
    "RoutingKind",
    "Sampling",
    "ScoreFunction",
    "Sharing",
    "TrainConfig",
]
