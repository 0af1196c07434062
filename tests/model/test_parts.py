"""The parts under test: every execution computes what the plain loop does, training starts as promised, all counted."""

import dataclasses

import jax
import numpy as np
import pytest
from equivalence_examples import EXPERT, TOKEN, assert_computes_the_same, by_model, by_plain_loop, random_params
from equivalence_examples import small_model as _small_model

from mor_jax.config import ModelConfig, PartsConfig, RecursionConfig, RoutingConfig
from mor_jax.config import io as config_io
from mor_jax.errors import UserError
from mor_jax.interop.description import describe
from mor_jax.interop.llama import check_expressible
from mor_jax.model.flops import count_parameters, forward_flops
from mor_jax.model.forward import forward
from mor_jax.model.sharing import full_config, share_layers
from mor_jax.model.transformer import init_params, logical_axes
from mor_jax.runs.optimizer import decay_mask

EVERYTHING = PartsConfig(
    qk_norm=True, input_injection=True, residual_scale="learned", zero_init=True, logit_softcap=5.0,
    value_residual=True, width_init=1000,
)  # fmt: skip
VANILLA = dataclasses.replace(EVERYTHING, input_injection=False)
SHARED = PartsConfig(qk_norm=True, input_injection=True, residual_scale="depth")


def small_model(
    parts: PartsConfig, recursion: RecursionConfig, routing: RoutingConfig | None = None, **changes
) -> ModelConfig:
    return _small_model(recursion, routing, parts=parts, **changes)


MOR = small_model(EVERYTHING, RecursionConfig(3, "middle_cycle"), EXPERT)
CASES = {
    "expert": (MOR, "packed", ("gather", "scan")),
    "expert, first pass selects": (
        small_model(
            SHARED,
            RecursionConfig(2, "cycle", kv_strategy="shared"),
            dataclasses.replace(EXPERT, capacities=(0.6, 0.5)),
        ),
        "whole",
        ("gather", "scan"),
    ),
    "token": (
        small_model(
            dataclasses.replace(SHARED, value_residual=True), RecursionConfig(2, "cycle", share_norms=False), TOKEN
        ),
        "packed",
        ("gather", "scan"),
    ),
    "recursive": (small_model(EVERYTHING, RecursionConfig(2, "cycle")), "whole", ("gather", "scan")),
    "sequence": (
        small_model(PartsConfig(qk_norm=True, residual_scale="learned"), RecursionConfig(2, "middle_sequence")),
        "whole",
        ("gather",),
    ),
    "vanilla": (small_model(VANILLA, RecursionConfig(), num_layers=3), "packed", ("gather",)),
}


@pytest.mark.parametrize("name", CASES)
def test_every_execution_is_the_plain_loop(name):
    config, rows, executions = CASES[name]
    params, packed = random_params(config), rows == "packed"
    plain = by_plain_loop(config, params, packed)
    for execution in executions:
        assert_computes_the_same(by_model(config, params, execution, packed), plain)
