"""Bytes that one training step exchanges, by mesh axis, model and kind of collective, read from compiled programs.

Compiles the gradient step of small float32 models for eight CPU devices and runs nothing. CPU's compiler writes the
sum of a gradient that ends sharded as an all-reduce; TPU's as a reduce-scatter, half the bytes.

    python experiments/sharding/measure.py            # measure, write results/traffic.json, print the table
    python experiments/sharding/measure.py --mesh "data 8"   # measure one mesh again, keep the other results
    python experiments/sharding/measure.py --table    # print the table of the committed results
"""

import argparse
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
# code generation is of no interest here; the passes that place collectives run all the same
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"

import jax

from mor_jax.config import (
    Config,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    PerfConfig,
    RecursionConfig,
    RoutingConfig,
    TrainConfig,
)
from mor_jax.mesh.mesh import make_mesh
from mor_jax.plan.collectives import Collective, bytes_by_kind, collectives
from mor_jax.plan.hlo import parse
from mor_jax.train.step import compile_train_step

RESULTS = Path(__file__).parent / "results" / "traffic.json"
MODELS = {
    "vanilla": (RecursionConfig(), RoutingConfig()),
    "recursive": (RecursionConfig(num_recursions=3, sharing="cycle"), RoutingConfig()),
    "MoR expert, recursion-wise KV": (RecursionConfig(num_recursions=3, sharing="cycle"), RoutingConfig(kind="expert")),
    "MoR expert, shared KV": (
        RecursionConfig(num_recursions=3, sharing="cycle", kv_strategy="shared"),
        RoutingConfig(kind="expert"),
    ),
}
MESHES = {
    "data 8": MeshConfig(),
    "fsdp 8": MeshConfig(fsdp=8),
    "data 2 x tensor 4": MeshConfig(tensor=4),
    "data 2 x context 4": MeshConfig(context=4),
    "slice 2 x fsdp 4": MeshConfig(slice=2, fsdp=4),
}


def config_of(model: str, mesh: MeshConfig) -> Config:
    """Six unrolled layers of width 256, 16 rows of 1024 tokens."""
    recursion, routing = MODELS[model]
    sizes = ModelConfig(
        vocab_size=4096,
        num_layers=6,
        d_model=256,
        num_heads=8,
        num_kv_heads=4,
        head_dim=32,
        d_ff=768,
        context_length=1024,
        dtype="float32",
        recursion=recursion,
        routing=routing,
    )
    train = TrainConfig(steps=1, batch_size=16)
    perf = PerfConfig(loss_chunk=128)
    return Config(model=sizes, train=train, mesh=mesh, perf=perf, optimizer=OptimizerConfig(warmup_steps=0))


def moves_hidden(item: Collective, config: Config) -> bool:
    """Whether routing moves hidden states [rows, tokens, width]: the exchanges that model/hidden_rows.py asks for."""
    asked = "_recursions/shard_map" in item.op_name
    return asked and any(len(s.sizes) == 3 and s.sizes[-1] == config.model.d_model for s in item.operands)


def measure(model: str, mesh_name: str) -> dict[str, Any]:
    """Compile one case and count."""
    config = config_of(model, MESHES[mesh_name])
    mesh = make_mesh(config.mesh)
    program: Any = compile_train_step(config, mesh)
    found = collectives(parse(program.as_text()), mesh.size, slices=mesh.shape["slice"])
    return {
        "model": model,
        "mesh": mesh_name,
        "by_kind": bytes_by_kind(found),
        "routing_hidden_bytes": sum(item.total_bytes for item in found if moves_hidden(item, config)),
        "temporary_bytes": program.memory_analysis().temp_size_in_bytes,
    }


def table(cases: list[dict[str, Any]]) -> str:
    """Markdown: MB that one device receives per step."""
    kinds = sorted({kind for case in cases for kind in case["by_kind"]})
    head = ["mesh", "model", *kinds, "across slices", "of it hidden states moved by routing"]
    lines = [head, ["---"] * 2 + ["---:"] * (len(head) - 2)]
    for case in cases:
        totals = case["by_kind"]
        cells = [totals.get(kind, {"bytes": 0})["bytes"] for kind in kinds]
        cells += [sum(total["bytes_across"] for total in totals.values()), case["routing_hidden_bytes"]]
        lines.append([case["mesh"], case["model"], *(f"{cell / 1e6:.2f}" for cell in cells)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Measure every case, or print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the committed results")
    parser.add_argument("--mesh", choices=MESHES, help="measure only this mesh again")
    options = parser.parse_args()
    if not options.table:
        kept = json.loads(RESULTS.read_text())["cases"] if options.mesh else []
        cases = []
        for mesh in MESHES:
            if options.mesh and mesh != options.mesh:
                cases += [case for case in kept if case["mesh"] == mesh]
                continue
            for model in MODELS:
                cases.append(measure(model, mesh))
                print(mesh, model, cases[-1]["by_kind"], flush=True)
        about = {
            "command": "python experiments/sharding/measure.py",
            "device": f"{len(jax.devices())} fake CPU devices, {platform.machine()}",
            "versions": {"jax": jax.__version__, "python": platform.python_version()},
            "cases": cases,
        }
        RESULTS.write_text(json.dumps(about, indent=1) + "\n")
    print(table(json.loads(RESULTS.read_text())["cases"]))


if __name__ == "__main__":
    sys.exit(main())
