"""Every rule of the configuration: broken, it is one message that names field, value and rule."""

import dataclasses
from typing import Any

import pytest

from mor_jax.config import (
    PLAIN,
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    PerfConfig,
    RecursionConfig,
    ResolvedPerf,
    RoutingConfig,
    TrainConfig,
)
from mor_jax.errors import UserError

CYCLE = RecursionConfig(2, "cycle")
EXPERT = RoutingConfig("expert")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_recursions": 0, "sharing": "cycle"}, "num_recursions=0 must be positive"),
        ({"sharing": "circle"}, "sharing='circle' is not one of 'none', 'cycle'"),
        ({"kv_strategy": "share"}, "kv_strategy='share' is not one of 'recursion', 'shared', 'shared_update'"),
        ({"base_depth": 0}, "base_depth=0 must be positive"),
        ({"num_recursions": 2}, "num_recursions=2 needs a parameter sharing, but sharing='none'"),
        ({"kv_strategy": "shared"}, "kv_strategy='shared' needs a parameter sharing, but sharing='none'"),
        (
            {"num_recursions": 2, "sharing": "middle_sequence", "kv_strategy": "shared_update"},
            "sharing='middle_sequence' has no such pass",
        ),
    ],
)
def test_recursion(fields, message):
    with pytest.raises(UserError, match=message):
        RecursionConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "experts"}, "routing.kind='experts' is not one of 'none', 'expert', 'token'"),
        ({"router": "deep"}, "routing.router='deep' is not one of"),
        ({"score": "relu"}, "routing.score='relu' is not one of"),
        ({"gating": "none"}, "routing.gating='none' is not one of"),
        ({"residual": "pre"}, "routing.residual='pre' is not one of"),
        ({"sampling": "aux"}, "routing.sampling='aux' is not one of"),
        ({"balancing": "free"}, "routing.balancing='free' is not one of"),
        ({"alpha": 0.0}, "alpha=0.0 must be positive"),
        ({"temperature": -1.0}, "temperature=-1.0 must be positive"),
        ({"capacity_multiple": 0}, "capacity_multiple=0 must be positive"),
        ({"capacity_slack": 0.0}, "capacity_slack=0.0 must be positive"),
        ({"capacity_warmup_steps": -1}, "capacity_warmup_steps=-1 must not be negative"),
        ({"balance_warmup_steps": -1}, "balance_warmup_steps=-1 must not be negative"),
        ({"sampling_coefficient": -0.1}, "sampling_coefficient=-0.1 must not be negative"),
        ({"balancing_coefficient": -0.1}, "balancing_coefficient=-0.1 must not be negative"),
        ({"bias_update_rate": -0.1}, "bias_update_rate=-0.1 must not be negative"),
        ({"z_loss_coefficient": -0.1}, "z_loss_coefficient=-0.1 must not be negative"),
        ({"kind": "expert", "score": "softmax"}, "expert-choice has one score per token"),
        ({"kind": "token", "score": "tanh"}, "score='tanh' is not one of 'softmax', 'sigmoid' for token-choice"),
        ({"kind": "token", "score": "softmax", "random": True}, "random=True is an ablation of expert-choice"),
        ({"kind": "expert", "capacities": (1.0, 0.5, 0.6)}, r"capacities=\(1.0, 0.5, 0.6\) must not ascend"),
        ({"kind": "expert", "capacities": (1.5, 0.5)}, r"1.5 is outside \(0, 1\]"),
        ({"kind": "expert", "capacities": (1.0, 0.0)}, r"0.0 is outside \(0, 1\]"),
        ({"kind": "expert", "capacities": (float("nan"),)}, r"nan is outside \(0, 1\]"),
        ({"kind": "token", "score": "softmax", "capacities": (0.9, 0.5)}, r"capacities\[0\] must be 1"),
    ],
)
def test_routing(fields, message):
    with pytest.raises(UserError, match=message):
        RoutingConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        *(
            ({name: 0}, f"{name}=0 must be positive")
            for name in ("vocab_size", "num_layers", "d_model", "num_heads", "num_kv_heads", "head_dim", "d_ff")
        ),
        ({"context_length": 0}, "context_length=0 must be positive"),
        ({"norm_epsilon": 0.0}, "norm_epsilon=0.0 must be positive"),
        ({"dtype": "float16"}, "dtype='float16' is not one of 'float32', 'bfloat16'"),
        ({"num_heads": 9, "num_kv_heads": 2}, "num_heads=9 is not divisible by num_kv_heads=2"),
        ({"head_dim": 5}, "head_dim=5 must be even"),
        (
            {"num_layers": 4, "recursion": RecursionConfig(3, "middle_cycle")},
            "num_layers=4 is too few for sharing='middle_cycle' with num_recursions=3: at least 5",
        ),
        (
            {"num_layers": 8, "recursion": RecursionConfig(3, "middle_cycle", base_depth=3)},
            "base_depth=3 x num_recursions=3 \\+ 2 exceeds num_layers=8",
        ),
        ({"routing": EXPERT}, "sharing='none' does not have"),
        (
            {"routing": EXPERT, "recursion": RecursionConfig(2, "sequence")},
            r"sharing='sequence' does not have \(use 'cycle' or 'middle_cycle'\)",
        ),
        (
            {"recursion": CYCLE, "routing": RoutingConfig("expert", capacities=(1.0, 0.5, 0.5))},
            "has 3 entries for num_recursions=2",
        ),
        (
            {"recursion": CYCLE, "routing": RoutingConfig("expert", boundaries=(0.0,))},
            "routing.boundaries=.* has 1 entries for num_recursions=2",
        ),
    ],
)
def test_model(fields, message):
    with pytest.raises(UserError, match=message):
        ModelConfig(**fields)


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (PerfConfig, {"execution": "loop"}, "perf.execution='loop' is not one of 'gather', 'scan'"),
        (PerfConfig, {"attention_backend": "flash"}, "perf.attention_backend='flash' is not one of"),
        (PerfConfig, {"remat": "all"}, "perf.remat='all' is not one of"),
        (PerfConfig, {"scan_unroll": -1}, "scan_unroll=-1 must not be negative"),
        (PerfConfig, {"loss_chunk": 0}, "loss_chunk=0 must be positive"),
        (OptimizerConfig, {"learning_rate": float("inf")}, "learning_rate=inf is not a finite number"),
        (OptimizerConfig, {"weight_decay": float("nan")}, "weight_decay=nan is not a finite number"),
        (TrainConfig, {"watchdog_seconds": float("inf")}, "watchdog_seconds=inf is not a finite number"),
        (TrainConfig, {"name": "../out"}, "train.name='../out' is the name of a folder in train.runs, not a path"),
        (RoutingConfig, {"boundaries": (0.0, float("nan"))}, "must be numbers, not NaN"),
        (RoutingConfig, {"router": "mlp", "router_expansion": 0}, "router_expansion=0 must be positive"),
        (RoutingConfig, {"router_expansion": 2}, "router_expansion=2 is the hidden width of an MLP"),
        (DataConfig, {"source": ""}, "data.source='' must name a source"),
        (DataConfig, {"workers": -1}, "workers=-1 must not be negative"),
        (DataConfig, {"source": "a,b", "weights": (1.0, 1.0, 1.0)}, "has more entries than the 2 sources"),
        (DataConfig, {"source": "a,b", "weights": (1.0, 0.0)}, "0.0 must be positive"),
        (DataConfig, {"source": "a", "weights": (float("inf"),)}, "inf must be positive"),
        (OptimizerConfig, {"learning_rate": 0.0}, "learning_rate=0.0 must be positive"),
        (OptimizerConfig, {"schedule": "linear"}, "optimizer.schedule='linear' is not one of 'wsd', 'cosine'"),
        (OptimizerConfig, {"epsilon": 0.0}, "epsilon=0.0 must be positive"),
        (OptimizerConfig, {"aux_router_ratio": 0.0}, "aux_router_ratio=0.0 must be positive"),
        (OptimizerConfig, {"warmup_steps": -1}, "warmup_steps=-1 must not be negative"),
        (OptimizerConfig, {"weight_decay": -0.1}, "weight_decay=-0.1 must not be negative"),
        (OptimizerConfig, {"clip_norm": -1.0}, "clip_norm=-1.0 must not be negative"),
        (OptimizerConfig, {"beta1": 1.0}, r"optimizer.beta1=1.0 is outside \[0, 1\)"),
        (OptimizerConfig, {"beta2": -0.1}, r"optimizer.beta2=-0.1 is outside \[0, 1\)"),
        (OptimizerConfig, {"decay_share": 1.1}, r"optimizer.decay_share=1.1 is outside \[0, 1\]"),
        (OptimizerConfig, {"min_ratio": -0.1}, r"optimizer.min_ratio=-0.1 is outside \[0, 1\]"),
        (MeshConfig, {"data": 0}, "mesh.data=0 must be positive, or -1 for the rest"),
        (MeshConfig, {"fsdp": 0}, "fsdp=0 must be positive"),
        (MeshConfig, {"tensor": 0}, "tensor=0 must be positive"),
        *(
            (TrainConfig, {name: 0}, f"{name}=0 must be positive")
            for name in ("steps", "batch_size", "accumulation", "log_every", "eval_rows", "keep")
        ),
        (TrainConfig, {"eval_every": -1}, "eval_every=-1 must not be negative"),
        (TrainConfig, {"save_every": -1}, "save_every=-1 must not be negative"),
        (TrainConfig, {"logit_z_loss": -1.0}, "logit_z_loss=-1.0 must not be negative"),
        (
            TrainConfig,
            {"batch_size": 10, "accumulation": 4},
            "train.batch_size=10 is not divisible by train.accumulation=4",
        ),
    ],
)
def test_the_other_sections(kind, fields, message):
    with pytest.raises(UserError, match=message):
        kind(**fields)


@pytest.mark.parametrize(
    ("sections", "name"),
    [
        ({"optimizer": OptimizerConfig(warmup_steps=11)}, "optimizer.warmup_steps"),
        (
            {"model": ModelConfig(recursion=CYCLE, routing=RoutingConfig("expert", capacity_warmup_steps=11))},
            "model.routing.capacity_warmup_steps",
        ),
        (
            {"model": ModelConfig(routing=RoutingConfig(balance_warmup_steps=11))},
            "model.routing.balance_warmup_steps",
        ),
    ],
)
def test_a_warm_up_fits_in_the_run(sections: dict[str, Any], name: str):
    base: dict[str, Any] = {"optimizer": OptimizerConfig(warmup_steps=0), "train": TrainConfig(steps=10)}
    with pytest.raises(UserError, match=f"{name}=11 exceeds train.steps=10"):
        Config(**{**base, **sections})


@pytest.mark.parametrize(
    ("layers", "recursion", "block", "unrolled"),
    [
        (32, RecursionConfig(), 32, 32),
        (32, RecursionConfig(2, "middle_cycle"), 15, 32),
        (32, RecursionConfig(3, "middle_cycle"), 10, 32),
        (32, RecursionConfig(4, "middle_cycle"), 7, 30),  # 30 / 4 rounds down
        (30, RecursionConfig(3, "middle_sequence"), 9, 29),
        (9, RecursionConfig(3, "cycle"), 3, 9),
        (10, RecursionConfig(3, "cycle"), 3, 9),
        (34, RecursionConfig(4, "middle_cycle", base_depth=8), 8, 34),
        (34, RecursionConfig(4, "middle_cycle", base_depth=5), 5, 22),
    ],
)
def test_depths_follow_the_released_rounding(layers, recursion, block, unrolled):
    model = ModelConfig(num_layers=layers, recursion=recursion)
    assert (model.block_depth, model.unrolled_depth) == (block, unrolled)


def test_capacities_are_equal_steps_unless_given():
    recursion = RecursionConfig(4, "cycle")
    assert ModelConfig(recursion=recursion).capacities == (1.0, 1.0, 1.0, 1.0)
    assert ModelConfig(recursion=recursion, routing=EXPERT).capacities == (1.0, 0.75, 0.5, 0.25)
    own = RoutingConfig("expert", capacities=(0.9, 0.5, 0.5, 0.1))
    assert ModelConfig(recursion=recursion, routing=own).capacities == (0.9, 0.5, 0.5, 0.1)


def test_a_resolved_perf_leaves_nothing_open_and_keeps_what_was_asked():
    assert PerfConfig().resolved() == PLAIN
    assert [f.name for f in dataclasses.fields(PerfConfig)] == [f.name for f in dataclasses.fields(PLAIN)]
    asked: dict[str, Any] = {
        "execution": "scan", "attention_backend": "xla", "remat": "full", "scan_unroll": 0, "loss_chunk": 64,
        "slot_multiple": 8, "logits_dtype": "bfloat16", "fusion": "mosaic", "whole_block": False,
        "compiler_options": ("a=b",),
    }  # fmt: skip
    assert PerfConfig(**asked).resolved() == ResolvedPerf(**asked)
    assert ResolvedPerf(**asked).asked == PerfConfig(**asked)
    changed: dict[str, Any] = asked | {"execution": "gather", "remat": "names"}
    assert PerfConfig(remat="names").resolved(ResolvedPerf(**asked)) == ResolvedPerf(**changed)


def test_loss_free_balancing_belongs_to_token_choice():
    token: dict[str, Any] = {"kind": "token", "score": "softmax"}
    assert RoutingConfig(**token, balancing="loss_free").is_loss_free
    assert not RoutingConfig(**token).is_loss_free and not RoutingConfig("expert", balancing="loss_free").is_loss_free
    assert RoutingConfig("expert", sampling="aux_router").has_aux_router
    assert not RoutingConfig(**token, sampling="aux_router").has_aux_router
