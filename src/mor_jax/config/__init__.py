"""Frozen configuration dataclasses with cross-field checks (paper sections 2 and 3, tables 3, 6 and 13 to 15).

``Config`` is the root that a run saves beside its checkpoints. ``ModelConfig`` holds everything that changes what the
model computes; ``PerfConfig`` only how it is executed, so it may differ between training and restoring (what it leaves
open is chosen where a step is compiled: ``ResolvedPerf``).
"""

from mor_jax.config.distributed import DistributedConfig
from mor_jax.config.execution import (
    PLAIN,
    AttentionBackend,
    Execution,
    Fusion,
    Kernels,
    LogitsDtype,
    MeshConfig,
    PerfConfig,
    Remat,
    RematPolicy,
    ResolvedPerf,
)
from mor_jax.config.growth import GrowthStage, Stage, fewer_passes, stage_models
from mor_jax.config.model import (
    Dtype,
    ModelConfig,
    RotaryPositions,
)
from mor_jax.config.parts import PartsConfig
from mor_jax.config.recursion import (
    Balancing,
    GateResidual,
    Gating,
    KvStrategy,
    LoraTarget,
    Mode,
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
    OptimizerKind,
    Packing,
    TrainConfig,
)

__all__ = [
    "PLAIN",
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
    "GrowthStage",
    "InitConfig",
    "InitStrategy",
    "Kernels",
    "KvStrategy",
    "LogitsDtype",
    "LoraTarget",
    "MeshConfig",
    "Mode",
    "ModelConfig",
    "OptimizerConfig",
    "OptimizerKind",
    "Packing",
    "PartsConfig",
    "PerfConfig",
    "RecursionConfig",
    "RelaxationConfig",
    "Remat",
    "RematPolicy",
    "ResolvedPerf",
    "RotaryPositions",
    "RouterKind",
    "RoutingConfig",
    "RoutingKind",
    "Sampling",
    "ScoreFunction",
    "Sharing",
    "Stage",
    "TrainConfig",
    "fewer_passes",
    "stage_models",
]
