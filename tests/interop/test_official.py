"""Weights of the release, in and out: bitwise round trips, and every bad tensor named at once."""

import copy
import dataclasses

import golden_files
import jax
import numpy as np
import pytest

from mor_jax.config import ModelConfig, RecursionConfig, RoutingConfig
from mor_jax.errors import UserError
from mor_jax.interop import official
from mor_jax.interop.description import KEYS
from mor_jax.model.parameters import split_router_state
from mor_jax.model.transformer import init_params

TINY = ModelConfig(
    vocab_size=13, num_layers=8, d_model=8, num_heads=2, num_kv_heads=1, head_dim=4, d_ff=12, context_length=16,
    dtype="float32",
)  # fmt: skip
EXPERT = "mor_expert_mc3_auxrouter"


def _equal_bits(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    same_keys = a.keys() == b.keys()
    return same_keys and all(a[k].shape == b[k].shape and a[k].tobytes() == b[k].tobytes() for k in a)


@pytest.mark.parametrize("name", golden_files.names())
def test_official_to_ours_to_official_is_bitwise(name):
    description, state = golden_files.model(name)
    config, params = official.load(description, state)
    described, exported = official.export(config, params)
    assert described == {key: description[key] for key in KEYS}
    assert config.attend_across_documents and config.rotary_positions == "row"
    assert _equal_bits(exported, state)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": False},
        {"tie_embeddings": False, "recursion": RecursionConfig(2, "middle_sequence", share_norms=False)},
        {"recursion": RecursionConfig(2, "cycle"), "routing": RoutingConfig("expert", capacities=(0.9, 0.3))},
        {
            "tie_embeddings": False,
            "recursion": RecursionConfig(3, "middle_cycle", kv_strategy="shared_update", base_depth=1),
            "routing": RoutingConfig("expert", router="wide_mlp", router_expansion=2, sampling="aux_router"),
        },
        {
            "recursion": RecursionConfig(3, "middle_cycle", share_norms=False),
            "routing": RoutingConfig("token", router="mlp", score="softmax", balancing="loss_free", capacity_slack=4.0),
        },
    ],
)
def test_ours_to_official_to_ours_is_bitwise(changes):
    config = dataclasses.replace(TINY, **changes)
    shapes = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    generator = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: generator.normal(size=leaf.shape).astype(np.float32), shapes)
    if config.routing.balancing == "loss_free":
        params["router_state"] = {"bias": np.array([0.5, -0.25, 0.0], np.float32)}
    loaded_config, loaded = official.load(*official.export(config, params))
    assert loaded_config == config
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    assert all(
        a.tobytes() == b.tobytes() for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(params), strict=True)
    )


@pytest.mark.parametrize("name", [EXPERT, "mor_token_mc3_lossfree", "kv_rec_sequence_nr3_L6"])
def test_a_whole_state_dict_with_its_ties_is_accepted(name):
    description, state = golden_files.model(name)
    whole = state | {alias: state[first].copy() for alias, first in description["ties"].items()}
    config, params = official.load(description, whole)
    assert _equal_bits(official.export(config, params)[1], state)


def test_router_bias_is_state_beside_the_parameters():
    config, params = official.load(*golden_files.model("mor_token_mc3_lossfree"))
    trained, bias_R, _ = split_router_state(params)
    assert "router_state" not in trained
    assert bias_R is not None and bias_R.shape == (config.recursion.num_recursions,)
    assert split_router_state(trained)[1] is None
    with pytest.raises(UserError, match="missing router_state/bias"):
        official.export(config, trained)


def test_running_boundaries_have_no_place_in_the_release_and_that_is_logged(caplog):
    config, params = official.load(*golden_files.model(EXPERT))
    running = {"router_state": {"boundaries": np.zeros(config.recursion.num_recursions, np.float32)}}
    with_boundaries = official.export(config, {**params, **running})[1]
    assert "running boundaries of expert-choice: they are left out" in caplog.text
    assert _equal_bits(with_boundaries, official.export(config, params)[1])


def test_every_bad_tensor_is_named_at_once():
    description, state = golden_files.model(EXPERT)
    missing, misshaped, mistyped = "model.norm.weight", "model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"
    untied = "model.layers.2.block.0.mlp.up_proj.weight"
    del state[missing]
    state[misshaped] = state[misshaped][:-1]
    state[mistyped] = state[mistyped].astype(np.float64)
    state["model.layers.9.extra.bias"] = np.zeros(3, np.float32)
    state[untied] = state["model.layers.1.block.0.mlp.up_proj.weight"] + 1
    with pytest.raises(UserError) as caught:
        official.load(description, state)
    message = str(caught.value)
    assert message.startswith("5 tensors do not fit")
    for part in (
        f"missing {missing}",
        f"misshaped {misshaped}: (42, 24), not (43, 24)",
        f"wrong dtype of {mistyped}: float64, not float32",
        "unknown model.layers.9.extra.bias",
        f"untied {untied} differs from model.layers.1.block.0.mlp.up_proj.weight",
    ):
        assert part in message


def test_untied_attention_of_the_early_release_is_refused_with_the_reason():
    with pytest.raises(UserError, match=r"early release 884fa5a.*82c97f29"):
        official.load(*golden_files.model(golden_files.UNTIED))


def test_bad_parameters_are_named_at_once_on_export():
    config, params = official.load(*golden_files.model(EXPERT))
    params["final_norm"]["scale"] = params["final_norm"]["scale"][:3]
    params["router"]["other"] = params["router"].pop("kernel")
    with pytest.raises(UserError, match=r"3 parameters.*missing router/kernel; unknown router/other; misshaped final"):
        official.export(config, params)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("mor.expert.alhpa", 1, "mor.expert.alhpa is unknown"),
        ("model.hidden_act", "gelu", "model.hidden_act='gelu'"),
        ("model.num_hidden_layers", 7, "keep 8"),
        ("model_kind", "mor", "model_kind='mor' is not one of"),
        ("model_kind", "vanilla", "recursive=.* does not fit model_kind='vanilla'"),
        (
            "kv_sharing",
            {"num_recursion": 2, "sharing": "middle_cycle", "update_cache": False},
            "kv_sharing.num_recursion=2",
        ),
        ("mor.expert.cap_warmup_step", None, "put the number there"),
        ("recursive", None, "mor without recursive"),
    ],
)
def test_bad_descriptions_are_refused(path, value, message):
    description, state = golden_files.model(EXPERT)
    description = copy.deepcopy(description)
    *parents, last = path.split(".")
    node = description
    for name in parents:
        node = node[name]
    node[last] = value
    with pytest.raises(UserError, match=message):
        official.load(description, state)


def test_update_cache_counts_only_where_the_release_obeys_it():
    description, state = golden_files.model("kv_mor_expert_c3")
    description["kv_sharing"]["update_cache"] = True
    assert official.load(description, state)[0].recursion.kv_strategy == "shared"
    config, _ = official.load(*golden_files.model("kv_mor_expert_mc3_update"))
    assert config.recursion.kv_strategy == "shared_update"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dataclasses.replace(TINY, recursion=RecursionConfig(2, "cycle")), "never ties the head"),
        (dataclasses.replace(TINY, attend_across_documents=False), "attend_across_documents"),
        (dataclasses.replace(TINY, rotary_positions="document"), r"cannot express this model: rotary_positions='doc"),
        (
            dataclasses.replace(
                TINY,
                recursion=RecursionConfig(2, "cycle", kv_strategy="shared_update"),
                routing=RoutingConfig("expert", residual="plain", capacity_multiple=8, router="wide_mlp"),
            ),
            "kv_strategy.*router_expansion.*residual.*capacity_multiple",
        ),
        (
            dataclasses.replace(
                TINY, recursion=RecursionConfig(2, "cycle"), routing=RoutingConfig("token", score="softmax")
            ),
            "crashes in the release",
        ),
    ],
)
def test_models_that_the_release_lacks_are_refused_before_anything_is_read(config, message):
    with pytest.raises(UserError, match=message):
        official.export(config, {})


def test_keys_and_values_shared_without_parameters_are_refused_with_that_reason():
    description, state = golden_files.model("kv_rec_cycle_nr2_L6")
    for lacking in ({**description, "recursive": None}, {k: v for k, v in description.items() if k != "recursive"}):
        with pytest.raises(UserError, match="kv_sharing without recursive"):
            official.load(lacking, state)
