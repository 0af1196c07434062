"""Compilation for TPUs by the real compiler: the train step, memory that does not suffice, and the flags."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from mor_jax.cli import main
from mor_jax.perf import COMPILER_OPTIONS
from mor_jax.plan import hlo
from mor_jax.plan.clock import read_clock
from mor_jax.plan.topology import GENERATIONS, describe_topology

pytestmark = pytest.mark.tpu_aot
pytest.importorskip("libtpu", reason="needs the tpu extra")

FLAGS = Path(__file__).parents[2] / "tpu" / "flags"
SMALL = (
    *("--topology", "v5e:2x2", "--mesh.fsdp", "2", "--model.d-model", "256", "--model.d-ff", "256"),
    *("--model.head-dim", "64", "--model.context-length", "256", "--model.dtype", "bfloat16"),
)


@pytest.fixture(autouse=True)
def _no_cache():
    """The persistent cache takes programs for described devices, but cannot read them back."""
    before = jax.config.jax_enable_compilation_cache  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", before)


@pytest.mark.parametrize("strategy", ["recursion", "shared"])
def test_the_train_step_compiles_with_the_fused_attention(strategy, capsys):
    """Both shapes of attention: among the selected tokens, and selected queries over shared keys."""
    assert main(["plan", "debug", *SMALL, "--model.recursion.kv-strategy", strategy, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["attention"] == "mosaic_tpu"
    assert plan["flops"]["kernel_calls"] == 2 * 4  # forward and backward kernels in each of four layers
    assert plan["mesh"] == {"slice": 1, "data": 2, "fsdp": 2, "context": 1, "tensor": 1}
    assert 0 < plan["memory_per_device"]["total"] < plan["memory_per_device"]["limit"]
    assert plan["collectives_per_device"]["all-gather"]["bytes"] > 0
    assert plan["loops_of_unknown_length"] == 0


def test_between_slices_gradients_travel_and_little_else(capsys):
    """At least every parameter's gradient once; at most a few times that: activations stay on their slice."""
    arguments = ["--topology", "v5e:2x2", "--slices", "2", "--mesh.fsdp", "2", "--json"]
    assert main(["plan", "debug", *arguments]) == 0
    plan = json.loads(capsys.readouterr().out)
    across = sum(kind["bytes_across"] for kind in plan["collectives_per_device"].values())
    gradients = plan["memory_per_device"]["parameters"]  # a device's share, float32
    assert plan["mesh"]["slice"] == 2
    assert 0.9 * gradients < across < 4 * gradients
    assert plan["estimate"]["seconds"]["network_across"] == across / GENERATIONS["v5e"].dcn_rate


def test_a_step_that_does_not_fit_names_its_need_and_what_would(capsys):
    """Half a million rows per chip, with the plain attention's scores."""
    arguments = ["--topology", "v5e:2x2", "--train.batch-size", "2097152", "--perf.loss-chunk", "128"]
    assert main(["plan", "debug", *arguments]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("mor plan: out of memory: the step needs ") and "GiB of the 15.75 GiB of a v5e chip" in line
    assert "by estimate" in line and "--train.accumulation" in line


def test_the_engine_compiles_for_one_chip(capsys):
    """A dispatch and a prompt chunk, on one of the four chips; neither works on a copy of the pools."""
    sizes = ("--engine.max-running", "4", "--engine.max-length", "128", "--engine.steps", "2")
    pages = ("--engine.block-pages", "65536", "--engine.edge-pages", "65536")
    assert main(["plan", "debug", "--topology", "v5e:2x2", "--decode", *sizes, *pages, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    memory = plan["memory_per_device"]
    assert plan["engine"]["backend"] == "xla" and plan["topology"]["chips"] == 4
    assert memory["kv_pages"] == 65536 * 16 * 2 * 2 * 16 * 4 * (1 + 2)  # float32, 2 heads of 16; block and edges
    assert memory["activations"] < memory["kv_pages"] / 20
    assert memory["total"] < memory["limit"]
    assert plan["estimate"]["tokens_per_second_at_most"] > 0


def test_the_compiler_refuses_a_shape_that_is_no_slice(capsys):
    assert main(["plan", "debug", "--topology", "v5e:7x9"]) == 2
    assert "on offer: v5e:1x1" in capsys.readouterr().err


@pytest.mark.parametrize("generation", sorted(GENERATIONS))
def test_the_clock_of_a_large_matmul_is_near_its_time_at_peak(generation):
    """Frequency and estimates fit together: never below the peak, and at most 1.5 times (1.14, 1.11, 1.42, 1.24)."""
    topology = describe_topology(f"{generation}:{GENERATIONS[generation].sizes[1]}")
    size, chip = 8192, topology.generation.chip
    argument = jax.ShapeDtypeStruct((size, size), "bfloat16", sharding=SingleDeviceSharding(topology.devices[0]))
    text = jax.jit(lambda x, y: x @ y).lower(argument, argument).compile().as_text()
    assert text is not None and chip.clock_hz is not None
    seconds = read_clock(hlo.parse(text), {}, topology.generation).cycles / chip.clock_hz
    assert 1 <= seconds * chip.flops / (2 * size**3) <= 1.5


def _options(generation: str) -> dict[str, str]:
    lines = (FLAGS / f"{generation}.env").read_text().splitlines()
    flags = [line.removeprefix("--") for line in lines if line and not line.startswith("#")]
    return dict(flag.split("=", 1) for flag in flags)


@pytest.mark.parametrize("generation", sorted(GENERATIONS))
def test_the_compiler_knows_every_flag(generation):
    """Together, on a product with gathered weights: some are refused only in company."""
    options = _options(generation) | dict(option.split("=") for option in COMPILER_OPTIONS.get(generation, ()))
    devices = describe_topology(f"{generation}:{GENERATIONS[generation].sizes[1]}").devices
    mesh = Mesh(np.array(devices), ("fsdp",))
    argument = jax.ShapeDtypeStruct((1024, 1024), "bfloat16", sharding=NamedSharding(mesh, PartitionSpec("fsdp")))
    lowered = jax.jit(lambda x: x @ x, out_shardings=NamedSharding(mesh, PartitionSpec())).lower(argument)
    assert len(options) >= 5
    lowered.compile(compiler_options=dict(options))
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option: 'xla_tpu_no_such_flag'"):
        lowered.compile(compiler_options={"xla_tpu_no_such_flag": "true"})


def test_every_flag_has_a_reason():
    """A comment stands above each group, and files exist for all generations and no others."""
    assert {path.stem for path in FLAGS.glob("*.env")} == set(GENERATIONS)
    for path in FLAGS.glob("*.env"):
        lines = path.read_text().splitlines()
        groups = [i for i, line in enumerate(lines) if line.startswith("--") and not lines[i - 1].startswith("--")]
        assert groups and all(lines[i - 1].startswith("# ") for i in groups)
