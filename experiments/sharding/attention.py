"""Attention over rows that `context` splits: all-gather of keys and values against a ring of permutes.

Compiles the gradient of both for eight fake CPU devices (float32, grouped-query heads), checks that they agree with one
device, and counts what one device receives and holds. Nothing is timed: fake devices share the host's cores.

    python experiments/sharding/attention.py
    python experiments/sharding/attention.py --topology v5e:2x4    # what TPU's compiler makes of it; needs jax[tpu]
"""

import argparse
import functools
import json
import os
import platform
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import PartitionSpec

from mor_jax.config import MeshConfig
from mor_jax.kernels.attention.backend import attend
from mor_jax.kernels.attention.mask import Mask, TokenView
from mor_jax.mesh.mesh import make_mesh
from mor_jax.plan.collectives import bytes_by_kind, collectives
from mor_jax.plan.hlo import parse

RESULTS = Path(__file__).parent / "results"
B, T, N, K, H = 1, 1024, 8, 4, 32
ROWS = PartitionSpec(None, "context")


def gathered(query: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
    """What the model does: keys and values gathered on every device, queries split."""
    rows = TokenView(rows_BC=jnp.arange(T)[None], positions_BC=jnp.arange(T)[None])
    return attend(query, keys, values, Mask(rows), "xla")


def ring(query: jax.Array, keys: jax.Array, values: jax.Array, shards: int) -> jax.Array:
    """Each device passes its keys and values on, and merges one block of scores after the other."""

    def local(query: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
        here, share = jax.lax.axis_index("context"), query.shape[1]
        query = query.reshape(B, share, K, N // K, H) * H**-0.5
        rows_T = here * share + jnp.arange(share)

        def step(carry: Any, hop: jax.Array) -> tuple[Any, None]:
            keys, values, largest, total, out = carry
            rows_S = (here - hop) % shards * share + jnp.arange(share)
            scores = jnp.einsum("BTKGH,BSKH->BKGTS", query, keys)
            scores = jnp.where((rows_S[None, :] <= rows_T[:, None])[None, None, None], scores, -1e30)
            top = jnp.maximum(largest, jnp.max(scores, axis=-1))
            weights, kept = jnp.exp(scores - top[..., None]), jnp.exp(largest - top)
            out = out * kept[..., None] + jnp.einsum("BKGTS,BSKH->BKGTH", weights, values)
            total = total * kept + jnp.sum(weights, axis=-1)
            around = [(i, (i + 1) % shards) for i in range(shards)]
            keys, values = (jax.lax.ppermute(x, "context", around) for x in (keys, values))
            return (keys, values, top, total, out), None

        shape = (B, K, N // K, share)
        start = (keys, values, jnp.full(shape, -1e30), jnp.zeros(shape), jnp.zeros((*shape, H)))
        (_, _, _, total, out), _ = jax.lax.scan(step, start, jnp.arange(shards))
        return jnp.moveaxis(out / total[..., None], 3, 1).reshape(B, share, N, H)

    return jax.shard_map(local, in_specs=(ROWS,) * 3, out_specs=ROWS, check_vma=False)(query, keys, values)


def gradient_of(attention: Any) -> Any:
    """Gradient of a scalar of the output in (queries, keys, values)."""
    return jax.grad(lambda arrays: jnp.sum(jnp.sin(attention(*arrays))))


def compile_on(devices: Any, shards: int, attention: Any, arrays: Any, dtype: Any) -> tuple[Any, Any]:
    """(executable of the gradient, sharding of its arguments)."""
    mesh = make_mesh(MeshConfig(data=1, context=shards), devices[:shards])
    rows = jax.NamedSharding(mesh, ROWS)
    shapes = [jax.ShapeDtypeStruct(x.shape, dtype, sharding=rows) for x in arrays]
    with jax.set_mesh(mesh):
        return jax.jit(gradient_of(attention), out_shardings=rows).lower(shapes).compile(), rows


def main() -> None:
    """Compile, check, count, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", help="compile for this TPU instead of the fake CPU devices")
    topology = parser.parse_args().topology
    devices = topologies.get_topology_desc(topology, "tpu").devices if topology else jax.devices()
    sizes = ((B, T, N, H), (B, T, K, H), (B, T, K, H))
    arrays = [np.random.default_rng(i).standard_normal(size).astype(np.float32) for i, size in enumerate(sizes)]
    dtype = jnp.bfloat16 if topology else jnp.float32  # as models compute there
    wanted = None if topology else gradient_of(gathered)(arrays)
    cases = []
    for shards in (8,) if topology else (2, 4, 8):
        for name, attention in (("all-gather", gathered), ("ring", functools.partial(ring, shards=shards))):
            program, rows = compile_on(devices, shards, attention, arrays, dtype)
            kinds = bytes_by_kind(collectives(parse(program.as_text()), shards))
            case = {"context": shards, "way": name, "by_kind": kinds}
            case["temporary_bytes"] = program.memory_analysis().temp_size_in_bytes
            if wanted is not None:
                pairs = zip(program(jax.device_put(arrays, rows)), wanted, strict=True)
                case["error"] = max(float(jnp.max(jnp.abs(a - b))) for a, b in pairs)
            cases.append(case)
            print(case, flush=True)
    about = {
        "command": "python experiments/sharding/attention.py" + (f" --topology {topology}" if topology else ""),
        "device": f"compiled for {topology}" if topology else f"{len(devices)} fake CPU devices, {platform.machine()}",
        "versions": {"jax": jax.__version__, "python": platform.python_version()},
        "sizes": {"B": B, "T": T, "N": N, "K": K, "H": H, "dtype": jnp.dtype(dtype).name},
    }
    path = RESULTS / (f"attention_{topology.replace(':', '_')}.json" if topology else "attention.json")
    path.write_text(json.dumps(about | {"cases": cases}, indent=1) + "\n")


if __name__ == "__main__":
    main()
