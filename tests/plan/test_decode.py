"""The plan of decoding: the engine's programs compiled for a CPU device in the place of a chip, its bound by hand."""

import dataclasses
import json

import jax
import pytest

from mor_jax import presets
from mor_jax.cli import main
from mor_jax.config import Config, MeshConfig
from mor_jax.errors import UserError
from mor_jax.infer.cache import kv_layout
from mor_jax.infer.decode_model import prepare_weights
from mor_jax.infer.engine import Engine
from mor_jax.infer.engine_options import EngineOptions
from mor_jax.infer.engine_shape import engine_shape
from mor_jax.mesh.devices import GIB
from mor_jax.model.flops import count_parameters
from mor_jax.model.transformer import init_params
from mor_jax.plan import decode as decode_module
from mor_jax.plan.compile import DoesNotFitError
from mor_jax.plan.decode import advise_decode, compile_decode, tree_bytes
from mor_jax.plan.decode_report import decode_bound, decode_report, pass_shares, print_decode_report
from mor_jax.plan.topology import GENERATIONS, Topology

CHIP = GENERATIONS["v5e"]
OPTIONS = EngineOptions(max_running=4, max_length=32, page_size=8, steps=2, prefill_rows=2, prefill_chunk=8)


def _config(name: str = "debug", **changes: object) -> Config:
    return dataclasses.replace(presets.get(name).config, **changes)


def _topology() -> Topology:
    return Topology("v5e:2x4", 1, CHIP, tuple(jax.devices()))


def _abstract_model(config: Config):
    return jax.eval_shape(lambda key: prepare_weights(config.model, init_params(config.model, key)), jax.random.key(0))


@pytest.fixture(scope="module")
def step():
    return compile_decode(_config(), _topology(), OPTIONS)


def test_memory_is_that_of_a_real_engine(step):
    """Parameters and pages of the plan are the bytes that an engine of the same sizes holds."""
    model, memory = _config().model, step.memory
    engine = Engine(prepare_weights(model, jax.jit(lambda: init_params(model, jax.random.key(0)))()), OPTIONS)
    assert memory.parameters == sum(leaf.nbytes for leaf in jax.tree.leaves(engine.model))
    assert memory.parameters >= count_parameters(model).total * 4  # float32
    assert memory.kv_pages == engine.measure().reserved
    assert memory.state > 0 and memory.activations > 0
    kinds = ("parameters", "kv_pages", "state", "padding", "activations", "code")
    assert memory.total == sum(getattr(memory, kind) for kind in kinds)


def test_the_pools_are_updated_in_place(step):
    """Neither program keeps a second copy of the pages: temporaries stay below them when they are many."""
    many = compile_decode(_config(), _topology(), dataclasses.replace(OPTIONS, block_pages=4096, edge_pages=4096))
    assert many.memory.kv_pages > 20 * step.memory.kv_pages
    assert many.dispatch.activations == step.dispatch.activations
    assert many.prefill.activations == step.prefill.activations


def test_a_plan_is_json_and_prints(step, capsys):
    plan = decode_report(step, ["mor", "plan", "debug", "--decode"])
    assert json.loads(json.dumps(plan)) == json.loads(json.dumps(plan, sort_keys=True))
    assert plan["engine"]["backend"] == "xla" and plan["programs"]["dispatch"]["seconds"] > 0
    print_decode_report(plan)
    printed = capsys.readouterr().out
    assert "decoding on one chip" in printed and "not sharded" in printed
    assert "estimate, nothing measured" in printed and "tokens/s of one chip" in printed


def test_the_bound_of_a_vanilla_model_reads_everything_once_per_token_and_slot():
    """One pass per token: block, head and all entries once per step of 4 tokens."""
    config = _config("vanilla-360m")
    model, weights = config.model, _abstract_model(config)
    bound = decode_bound(weights, engine_shape(weights, EngineOptions(max_running=4)), CHIP, 1000)
    entries = 4 * 1000 * 2 * 5 * 64 * 2 * 32
    assert bound.tokens_per_block_step == 4 and bound.exit_steps_per_block_step == 1
    assert bound.block_entries + bound.exit_entries == entries
    assert bound.block_weights + bound.exit_weights == pytest.approx(2 * count_parameters(model).total, rel=1e-3)
    read = bound.block_weights + bound.exit_weights + entries
    assert bound.tokens_per_second == pytest.approx(4 / (read / CHIP.chip.hbm_rate))
    assert bound.limit == "memory"


def test_the_bound_of_a_routed_model_follows_the_tokens_that_reach_each_pass():
    """Capacities 1, 2/3, 1/3: two passes per token, and a pass sees (1 + 4/9 + 1/9) / 2 of the text."""
    config = _config("mor-360m-expert-r3")
    weights = _abstract_model(config)
    assert pass_shares(config.model) == pytest.approx((1, 2 / 3, 1 / 3))
    shape = engine_shape(weights, EngineOptions(max_running=30))
    bound = decode_bound(weights, shape, CHIP, 900)
    assert (shape.block_slots, shape.exit_slots) == (20, 10)
    assert bound.tokens_per_block_step == pytest.approx(10)
    per_layer = 2 * 5 * 64 * 2
    assert bound.block_entries == pytest.approx(20 * 900 * (1 + 4 / 9 + 1 / 9) / 2 * per_layer * 10)
    assert bound.exit_entries == 10 * 900 * per_layer * 2
    assert bound.block_weights == tree_bytes(weights.block)


def test_out_of_memory_names_what_fits(monkeypatch):
    def compile_nothing(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Used 23.41G of 15.75G hbm.")

    monkeypatch.setattr(decode_module, "_compile", compile_nothing)
    with pytest.raises(DoesNotFitError, match=r"the engine needs 23.41 GiB of the 15.75 GiB of a v5e chip"):
        compile_decode(_config(), _topology(), OPTIONS)
    config = _config("mor-360m-expert-r3")
    advice = advise_decode(config, _topology(), EngineOptions(max_running=10**6))
    running, layout = int(advice.split("--engine.max-running ")[1].split()[0]), kv_layout(config.model)
    pages = 2048 * 2 * 5 * 64 * 2 * (layout.groups * layout.block_layers + layout.edge_layers) * running
    # 512 entries of one layer are gathered: the compiler of a TPU fills heads up to 8 and head dims to 128
    gathered = 512 * 2 * 5 * 64 * 2 * 8 / 5 * 128 / 64 * running
    assert 0.8 * CHIP.program_bytes < 1.25 * pages + gathered < 0.9 * CHIP.program_bytes
    huge = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=2**25))
    assert "no room for a sequence" in advise_decode(huge, _topology(), OPTIONS)
    assert 15.75 * GIB < 2**25 * 960 * 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--decode", "--mesh.fsdp", "2"), "mesh.fsdp=2 has no meaning for --decode"),
        (("--decode", "--search"), "does not go with --decode"),
        (("--engine.max-running", "4"), "needs --decode"),
        (("--decode", "--engine.products", "xla"), "--engine.products is gone: the kernels gained nothing over XLA's"),
        (("--decode", "--model.recursion.kv-strategy", "shared_update"), "shared_update' cannot decode"),
    ],
)
def test_what_has_no_meaning_is_refused(flags, message, monkeypatch, capsys):
    monkeypatch.setattr("mor_jax.plan.topology.describe_topology", lambda *_: _topology())
    assert main(["plan", "debug", *flags]) == 2
    assert message in capsys.readouterr().err


def test_the_mesh_of_a_preset_does_not_stand_in_the_way():
    assert MeshConfig().fsdp == 1
    with pytest.raises(UserError, match=r"mesh\.tensor=2"):
        compile_decode(_config(mesh=MeshConfig(tensor=2)), _topology(), OPTIONS)
