"""The serving benchmark: how engines are sized, and a tiny run of the whole."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from mor_jax.bench import serving as serve
from mor_jax.bench.serving_profile import summarize
from mor_jax.bench.serving_settings import ServeSettings
from mor_jax.bench.serving_setup import (
    Scenario,
    bytes_per_position,
    make_requests,
    options_for,
    parse_model,
)
from mor_jax.cli.bench_serve import line
from mor_jax.config import ModelConfig, RecursionConfig, RoutingConfig
from mor_jax.errors import UserError
from mor_jax.infer.decode_model import DecodeModel
from mor_jax.infer.engine_options import EngineMesh
from mor_jax.model.transformer import init_params

VANILLA = ModelConfig(64, 6, 16, 2, 1, 8, 24, 64)
MOR = dataclasses.replace(
    VANILLA, recursion=RecursionConfig(2, "middle_cycle"), routing=RoutingConfig("expert"), num_layers=6
)
SETTINGS = ServeSettings(batches=(8,), reserve=64, requests=50, mean_length=20, std_length=5, page_size=8)


def _shell(config: ModelConfig) -> DecodeModel:
    """A model without layers, for sizes only."""
    nothing = np.zeros((config.vocab_size, config.d_model), np.float32)
    return DecodeModel(config=config, embedding_VD=nothing, head_VD=None, block=(), final_norm_D=nothing[0])  # type: ignore[arg-type]


def test_engines_are_sized_by_slots_or_by_bytes():
    vanilla = options_for(_shell(VANILLA), SETTINGS, Scenario("slots", 8, None))
    assert (vanilla.max_running, vanilla.block_slots, vanilla.exit_slots, vanilla.block_pages) == (8, 8, 8, 64)
    slots = options_for(_shell(MOR), SETTINGS, Scenario("slots", 8, 1e9))
    assert (slots.max_running, slots.block_slots, slots.exit_slots, slots.exit_at) == (24, 8, 16, 16)
    weights = 64 * 16 * 4 + 16 * 4
    budget = weights + 10.5 * 64 * bytes_per_position(MOR, "model")
    memory = options_for(_shell(MOR), SETTINGS, Scenario("memory", 8, budget))
    assert (memory.max_running, memory.block_slots, memory.block_pages, memory.edge_pages) == (10, 10, 120, 80)
    assert (memory.exit_slots, memory.exit_at) == (10, 1)
    with pytest.raises(UserError, match="exceed the budget"):
        options_for(_shell(MOR), SETTINGS, Scenario("memory", 8, weights - 1.0))


def test_all_models_get_the_same_requests():
    requests = make_requests(VANILLA, SETTINGS)
    assert requests == make_requests(MOR, SETTINGS) and len(requests) == 50
    assert all(len(r.prompt) == 1 and 1 <= r.max_tokens <= 64 for r in requests)
    assert 15 < np.mean([r.max_tokens for r in requests]) < 25


def test_models_are_presets_with_layers():
    assert parse_model("vanilla-360m@34").num_layers == 34
    assert parse_model("mor-360m-expert-r4").recursion.num_recursions == 4
    with pytest.raises(UserError, match="'many' is not a number of layers"):
        parse_model("vanilla-360m@many")
    with pytest.raises(UserError, match="matches='size' is not one of"):
        ServeSettings(matches=("size",))  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_tiny_run_reports_what_it_measured(monkeypatch):
    monkeypatch.setattr(serve, "parse_model", {"vanilla": VANILLA, "mor": MOR}.get)
    settings = dataclasses.replace(SETTINGS, matches=("slots", "memory"), calibration_rows=4)
    record = json.loads(json.dumps(serve.bench_serve(["vanilla", "mor"], settings)))
    first, slots, memory = record["results"]
    tokens = sum(r.max_tokens for r in make_requests(VANILLA, settings))
    assert [r["tokens"] for r in (first, slots, memory)] == [tokens] * 3
    assert [r["compilations_after_warm_up"] for r in (first, slots, memory)] == [0, 0, 0]
    assert first["ratio"] == 1 and slots["ratio"] == slots["tokens_per_second"] / first["tokens_per_second"]
    assert "calibrated to the training capacities" in slots["router"] and "router" not in first
    budget = first["bytes_of_parameters_and_reserved_keys_and_values"]
    assert memory["bytes_of_parameters_and_reserved_keys_and_values"] <= budget
    assert sum(slots["tokens_per_depth"].values()) == pytest.approx(1)


@pytest.mark.slow
def test_figures_of_a_mesh_are_those_of_all_its_devices(monkeypatch):
    models = {name: dataclasses.replace(model, num_kv_heads=2) for name, model in (("vanilla", VANILLA), ("mor", MOR))}
    monkeypatch.setattr(serve, "parse_model", models.get)
    settings = dataclasses.replace(
        SETTINGS, batches=(4,), requests=24, matches=("memory",), calibration_rows=4, mesh=EngineMesh(data=2, tensor=2)
    )
    record = json.loads(json.dumps(serve.bench_serve(["vanilla", "mor"], settings)))
    assert record["devices"] == 4 and record["settings"]["mesh"] == {"data": 2, "tensor": 2}
    tokens = sum(r.max_tokens for r in make_requests(VANILLA, settings))
    first, memory = record["results"]
    for result in (first, memory):
        assert result["tokens"] == tokens and result["compilations_after_warm_up"] == 0
        assert result["copies"] == 2 and result["in_flight"] == 2 * result["options"]["max_running"]
        assert result["peak_kv_bytes"]["used"] > 0 and 0 < result["block_slot_use"] <= 1
        assert f", {result['in_flight']} in flight, {2 * result['options']['block_slots']} block slots" in line(
            {"router": "", **result}
        )
    shapes = jax.eval_shape(lambda: init_params(models["vanilla"], jax.random.key(0)))
    weights = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
    assert first["in_flight"] == 8 and first["parameter_bytes"] == pytest.approx(2 * weights / 2, rel=0.1)  # bfloat16
    budget = first["bytes_of_parameters_and_reserved_keys_and_values"]
    assert first["parameter_bytes"] < memory["bytes_of_parameters_and_reserved_keys_and_values"] <= budget
    assert memory["in_flight"] > first["in_flight"]


def test_meshes_that_cannot_be_measured_are_refused():
    with pytest.raises(UserError, match=r"profile=True tells the kernels of one device, not of mesh\.data=2 x"):
        ServeSettings(profile=True, mesh=EngineMesh(data=2))
    with pytest.raises(UserError, match=r"mesh\.data=9 x mesh.tensor=1 = 9 devices, but there are 8"):
        serve.bench_serve(["vanilla-360m"], ServeSettings(mesh=EngineMesh(data=9)))


def test_kernels_of_a_dispatch_are_added_up_by_name():
    kernels = [("product_norm", 1.0, 0.2), ("product_norm__1", 1.1, 0.2), ("loop_add_fusion_12", 1.5, 0.1)]
    found = summarize(kernels, steps=2, count=5)
    assert found["kernels_per_step"] == 1.5
    # the first two overlap
    np.testing.assert_allclose(found["busy_microseconds_per_step"], 0.4e6 / 2)
    np.testing.assert_allclose(found["span_microseconds_per_step"], 0.6e6 / 2)
    assert [(k["name"], k["number_per_step"]) for k in found["kernels"]] == [
        ("product_norm", 1),
        ("loop_add_fusion", 0.5),
    ]
    assert summarize([], steps=2, count=5)["kernels"] == []
