"""The modern parts: every execution computes what the plain loop does, training starts as promised, all counted."""

import dataclasses

import jax
import numpy as np
import pytest
from equivalence_examples import (
    EXPERT,
    TOKEN,
    assert_computes_the_same,
    by_model,
    by_plain_loop,
    random_params,
    small_model,
)

from mor_jax.config import ModelConfig, PartsConfig, RecursionConfig
from mor_jax.config import io as config_io
from mor_jax.errors import UserError
from mor_jax.interop.description import describe
from mor_jax.interop.llama import check_expressible
from mor_jax.model.flops import count_parameters, forward_flops
from mor_jax.model.sharing import full_config, share_layers
from mor_jax.model.transformer import init_params, logical_axes
from mor_jax.runs.optimizer import decay_mask

ALL = PartsConfig(qk_norm=True, value_residual=True)
NORMS = PartsConfig(qk_norm=True)
VANILLA = small_model(RecursionConfig(), num_layers=3, parts=ALL)
FIRST_SELECTS = dataclasses.replace(EXPERT, capacities=(0.6, 0.5))
CASES = {
    "expert": small_model(RecursionConfig(2, "middle_cycle"), EXPERT, parts=NORMS),
    "shared": small_model(RecursionConfig(2, "cycle", kv_strategy="shared"), FIRST_SELECTS, parts=NORMS),
    "token": small_model(RecursionConfig(2, "cycle", share_norms=False), TOKEN, parts=NORMS),
    "sequence": small_model(RecursionConfig(2, "middle_sequence"), parts=NORMS),
    "vanilla": VANILLA,
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n == "vanilla" else pytest.mark.slow) for n in CASES])
def test_every_execution_is_the_plain_loop(name):
    config = CASES[name]
    packed = name in ("expert", "token", "vanilla")
    params, recursion = random_params(config), config.recursion
    plain = by_plain_loop(config, params, packed)
    executions = ("gather", "scan") if recursion.num_recursions > 1 and not recursion.is_sequence else ("gather",)
    for execution in executions:
        assert_computes_the_same(by_model(config, params, execution, packed), plain)


@pytest.mark.parametrize("name", CASES)
def test_parameters_are_counted_sharded_by_name_and_not_decayed_where_they_scale(name):
    config = CASES[name]
    params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    assert count_parameters(config).total == sum(leaf.size for leaf in jax.tree.leaves(params))
    axes, decayed = logical_axes(config), decay_mask(params)
    expected = {
        ("value_residual",): ("recursions", "layers"),
        ("block", "attention", "query_norm"): ("layers", "head_dim"),
        ("block", "attention", "key_norm"): ("layers", "head_dim"),
    }
    found = 0
    for path, names in expected.items():
        if path[0] in params:
            of_leaf, shrinks = axes, decayed
            for key in path:
                of_leaf, shrinks = of_leaf[key], shrinks[key]
            assert of_leaf == {"scale": names} and shrinks == {"scale": False}
            found += 1
    assert found == (3 if name == "vanilla" else 2)


def test_the_product_of_the_value_residual_is_counted():
    without = dataclasses.replace(VANILLA, parts=NORMS)
    more = forward_flops(VANILLA)["block"] - forward_flops(without)["block"]
    assert more == 2 * VANILLA.context_length * VANILLA.d_model * VANILLA.num_kv_heads * VANILLA.head_dim


def test_what_has_no_meaning_is_refused():
    with pytest.raises(UserError, match=r"parts.value_residual=True needs recursion.sharing='none', not 'cycle'"):
        small_model(RecursionConfig(2, "cycle"), parts=PartsConfig(value_residual=True))


def test_a_configuration_without_parts_has_none():
    values = config_io.to_dict(VANILLA)
    del values["parts"]
    assert config_io.from_dict(ModelConfig, values) == dataclasses.replace(VANILLA, parts=PartsConfig())


def test_a_configuration_with_deleted_parts_opens_if_they_are_off():
    off = {"zero_init": False, "width_init": None, "input_injection": False, "residual_scale": "none"}
    off |= {"logit_softcap": None, "qk_norm": True}
    assert config_io.from_dict(PartsConfig, off) == PartsConfig(qk_norm=True)
    on = {"zero_init": True, "residual_scale": "learned", "logit_softcap": 30.0}
    with pytest.raises(UserError, match=r"parts.zero_init=True, residual_scale='learned', logit_softcap=30.0 was"):
        config_io.from_dict(PartsConfig, on)


def test_exports_refuse_by_name_what_changes_the_model():
    plain = dataclasses.replace(VANILLA, attend_across_documents=True, parts=PartsConfig())
    check_expressible(plain)
    describe(plain)
    for export in (check_expressible, describe):
        with pytest.raises(UserError, match=r"parts.qk_norm=True.*parts.value_residual=True"):
            export(dataclasses.replace(plain, parts=VANILLA.parts))


def test_uptraining_keeps_norms_of_heads():
    config = small_model(RecursionConfig(2, "middle_cycle"), parts=PartsConfig(qk_norm=True))
    full = full_config(config)
    params = jax.tree.map(np.asarray, random_params(full))
    built = share_layers(full, params, config, "stepwise", key=jax.random.key(0))
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    assert jax.tree.map(np.shape, built) == jax.tree.map(lambda leaf: leaf.shape, shapes)
    norms_LH = params["block"]["attention"]["query_norm"]["scale"]
    np.testing.assert_array_equal(built["first"]["attention"]["query_norm"]["scale"], norms_LH[0])
    plain = dataclasses.replace(full, parts=PartsConfig())
    with pytest.raises(UserError, match=r"the models differ in parts.qk_norm: False -> True"):
        share_layers(plain, params, config, "stepwise", key=jax.random.key(0))
