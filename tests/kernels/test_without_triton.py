"""The package where JAX has no Triton backend of Pallas: everything imports, trains and decodes, without it."""

import os
import subprocess
import sys

PROGRAM = """
import importlib, importlib.abc, logging, pkgutil, sys
from types import SimpleNamespace

class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.startswith(("jax.experimental.pallas.triton", "jax._src.pallas.triton")):
            raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, Hidden())
import mor_jax

# extras may be missing; our own modules may not
missing = []
for module in pkgutil.walk_packages(mor_jax.__path__, "mor_jax."):
    if module.name.endswith("__main__"):
        continue
    try:
        importlib.import_module(module.name)
    except ModuleNotFoundError as error:
        assert error.name and not error.name.startswith(("jax", "mor_jax")), error
        missing.append(error.name)
assert not any(name.startswith("jax.experimental.pallas.triton") for name in sys.modules)
print("missing", sorted(set(missing)))

import dataclasses
import jax, jax.numpy as jnp, numpy as np
from mor_jax.bench.measure import random_batch
from mor_jax.config import Config, ModelConfig, PerfConfig, RecursionConfig, RoutingConfig, TrainConfig
from mor_jax.errors import UserError
from mor_jax.infer.engine import Engine
from mor_jax.infer.engine_options import EngineOptions
from mor_jax.infer.decode_model import prepare_weights
from mor_jax.infer.request import Request
from mor_jax.infer import paged_attention
from mor_jax.kernels.attention.backend import resolve_backend
from mor_jax.mesh.mesh import make_mesh, shard_batch
from mor_jax.perf import resolve_perf
from mor_jax.runs.state import init_train_state
from mor_jax.train.step import compile_train_step

logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
logging.getLogger("jax").setLevel(logging.WARNING)
model = ModelConfig(48, 4, 16, 2, 1, 16, 32, 16, dtype="float32",
    recursion=RecursionConfig(num_recursions=2, sharing="middle_cycle"), routing=RoutingConfig(kind="expert"))
config = Config(model=model, train=TrainConfig(batch_size=2, steps=100))
mesh = make_mesh(config.mesh, jax.devices()[:1])
resolved = dataclasses.replace(config, perf=resolve_perf(config, mesh))
state = init_train_state(resolved, mesh)
batch = shard_batch(mesh, random_batch(model, 2, packed=False, seed=0))
state, metrics = compile_train_step(resolved, mesh)(state, batch)
assert np.isfinite(float(metrics["loss"]))
print("trained")

model = dataclasses.replace(model, routing=RoutingConfig(kind="none"))
params = init_train_state(dataclasses.replace(resolved, model=model), mesh).params
engine = Engine(prepare_weights(model, params), EngineOptions(max_running=2))
engine.submit(Request(prompt=(1, 2, 3), max_tokens=4))
tokens = []
while engine.busy:
    tokens += engine.step()
assert tokens
print("decoded")

# a GPU, which is only pretended
jax.default_backend = lambda: "gpu"
jax.devices = lambda *_: [SimpleNamespace(compute_capability="8.0", platform="gpu")]
half = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype="bfloat16", head_dim=64))
device = SimpleNamespace(platform="gpu", device_kind="NVIDIA A100-SXM4-80GB", memory_stats=lambda: None)
gpu = SimpleNamespace(devices=np.array([device]), shape={"data": 1, "fsdp": 1, "tensor": 1}, size=1)
perf = resolve_perf(half, gpu)
print("chosen", perf.fusion, perf.attention_backend)
print("decoding", paged_attention.decode_backend(half.model), paged_attention.prompts_backend("bfloat16", 64))
for change in ({"fusion": "triton"}, {"attention_backend": "triton"}):
    try:
        asked = dataclasses.replace(half, perf=PerfConfig(**change))
        resolve_perf(asked, gpu)
        resolve_backend(asked.perf.attention_backend, "bfloat16", 64, 1)
    except UserError as error:
        print("refused", error)
"""


def test_everything_runs_where_the_module_is_missing():
    environment = dict(os.environ, JAX_PLATFORMS="cpu", XLA_FLAGS="--xla_backend_optimization_level=0")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=300, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert {"trained", "decoded", "chosen xla cudnn", "decoding xla xla"} <= set(lines)
    reason = "this version of JAX has no Triton backend of Pallas"
    assert [line for line in lines if line.startswith("refused")] == [
        f"refused perf.fusion='triton': {reason}",
        f"refused perf.attention_backend='triton': {reason}",
    ]
    assert f"attention backend: cudnn (asked for auto; {reason})" in lines
    assert f"kernel, norms, rotations, SwiGLU, softmax of the loss: XLA ({reason})" in lines
