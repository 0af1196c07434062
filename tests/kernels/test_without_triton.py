"""The package where JAX has no Triton backend of Pallas: everything imports, chooses, trains and decodes without it."""

import os
import subprocess
import sys

import pytest

HIDE = """
import importlib.abc, sys

class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.startswith(("jax.experimental.pallas.triton", "jax._src.pallas.triton")):
            raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, Hidden())
"""

IMPORT_ALL = """
import importlib, pkgutil
import mor_jax, mor_jax.errors

for module in pkgutil.walk_packages(mor_jax.__path__, "mor_jax."):
    if module.name.endswith("__main__"):
        continue
    try:
        importlib.import_module(module.name)
    except (ModuleNotFoundError, mor_jax.errors.UserError) as error:  # extras may be missing
        cause = error if isinstance(error, ModuleNotFoundError) else error.__cause__
        if not isinstance(cause, ModuleNotFoundError) or cause.name.startswith(("jax", "mor_jax")):
            raise
assert not any(name.startswith("jax.experimental.pallas.triton") for name in sys.modules)
print("imported")
"""

CHOOSE = """
import dataclasses, logging
from types import SimpleNamespace
import jax, numpy as np
from mor_jax import presets
from mor_jax.config import PerfConfig
from mor_jax.errors import UserError
from mor_jax.infer.paged_attention import decode_backend, prompts_backend
from mor_jax.kernels.attention.backend import resolve_backend
from mor_jax.perf import resolve_perf

logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
# a GPU, which is only pretended
jax.default_backend = lambda: "gpu"
jax.devices = lambda *_: [SimpleNamespace(compute_capability="8.0", platform="gpu")]
device = SimpleNamespace(platform="gpu", device_kind="NVIDIA A100-SXM4-80GB", memory_stats=lambda: None)
mesh = SimpleNamespace(devices=np.array([device]), shape={"data": 1, "fsdp": 1, "tensor": 1}, size=1)
config = presets.get("vanilla-360m").config

def chosen(**changes):
    return resolve_perf(dataclasses.replace(config, perf=PerfConfig(**changes)), mesh)

perf = chosen()
print("chosen", perf.fusion, perf.attention_backend)
print("decoding", decode_backend(config.model), prompts_backend("bfloat16", 64))
for ask in (lambda: chosen(fusion="triton"), lambda: resolve_backend("triton", "bfloat16", 64, 1)):
    try:
        ask()
    except UserError as error:
        print("refused", error)
"""

TRAIN_AND_DECODE = """
import dataclasses
import jax, jax.numpy as jnp, numpy as np
from mor_jax.bench.measure import random_batch
from mor_jax.config import Config, ModelConfig, RecursionConfig, RoutingConfig, TrainConfig
from mor_jax.infer.engine import Engine
from mor_jax.infer.engine_options import EngineOptions
from mor_jax.infer.decode_model import prepare_weights
from mor_jax.infer.request import Request
from mor_jax.mesh.mesh import make_mesh, shard_batch
from mor_jax.runs.state import init_train_state
from mor_jax.train.step import compile_train_step

model = ModelConfig(48, 4, 16, 2, 1, 16, 32, 16, dtype="float32",
    recursion=RecursionConfig(num_recursions=2, sharing="middle_cycle"), routing=RoutingConfig(kind="expert"))
config = Config(model=model, train=TrainConfig(batch_size=2, steps=100))
mesh = make_mesh(config.mesh, jax.devices()[:1])
state = init_train_state(config, mesh)
batch = shard_batch(mesh, random_batch(model, 2, packed=False, seed=0))
state, metrics = compile_train_step(config, mesh)(state, batch)
assert np.isfinite(float(metrics["loss"]))
print("trained")

model = dataclasses.replace(model, routing=RoutingConfig(kind="none"))
params = init_train_state(dataclasses.replace(config, model=model), mesh).params
engine = Engine(prepare_weights(model, params), EngineOptions(max_running=2))
engine.submit(Request(prompt=(1, 2, 3), max_tokens=4))
tokens = []
while engine.busy:
    tokens += engine.step()
assert tokens
print("decoded")
"""


def _run(*programs: str) -> list[str]:
    environment = dict(os.environ, JAX_PLATFORMS="cpu", XLA_FLAGS="--xla_backend_optimization_level=0")
    done = subprocess.run(
        [sys.executable, "-c", "".join((HIDE, *programs))],
        capture_output=True,
        text=True,
        timeout=600,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_gpu_gets_mosaic_cudnn_and_xla():
    lines = _run(CHOOSE)
    assert {"chosen xla cudnn", "decoding xla xla"} <= set(lines)
    reason = "this version of JAX has no Triton backend of Pallas"
    assert [line for line in lines if line.startswith("refused")] == [
        f"refused perf.fusion='triton': {reason}",
        f"refused perf.attention_backend='triton': {reason}",
    ]
    assert f"attention backend: cudnn (asked for auto; {reason})" in lines
    assert f"kernel, norms, rotations, SwiGLU, softmax of the loss: XLA ({reason})" in lines


@pytest.mark.slow
def test_every_module_imports_a_step_trains_and_an_engine_decodes():
    assert _run(IMPORT_ALL, TRAIN_AND_DECODE) == ["imported", "trained", "decoded"]
