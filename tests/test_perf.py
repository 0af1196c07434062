"""What `perf` leaves open is filled by device and shape; filling changes nothing that the model computes."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mor_jax import perf as perf_module
from mor_jax import presets
from mor_jax.bench.measure import random_batch
from mor_jax.config import (
    PLAIN,
    Config,
    ModelConfig,
    PerfConfig,
    RecursionConfig,
    RematPolicy,
    RoutingConfig,
    TrainConfig,
)
from mor_jax.errors import UserError
from mor_jax.kernels import pallas_triton, swiglu_hopper
from mor_jax.mesh.mesh import make_mesh
from mor_jax.model.flops import block_parameters
from mor_jax.perf import COMPILER_OPTIONS, activation_bytes, compiler_options, resolve_perf, state_bytes
from mor_jax.runs.state import init_train_state
from mor_jax.train.objective import loss_fn


def _mesh(kind: str, platform: str, memory: int | None = None) -> Any:
    """A mesh of one described device."""
    stats = None if memory is None else {"bytes_limit": memory}
    device = SimpleNamespace(platform=platform, device_kind=kind, memory_stats=lambda: stats)
    return SimpleNamespace(devices=np.array([device]), shape={"data": 1, "fsdp": 1, "tensor": 1}, size=1)


def test_a_cpu_keeps_the_plain_execution_and_overrides_stay():
    config = presets.get("debug").config
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    perf = resolve_perf(config, mesh)
    assert perf == dataclasses.replace(PLAIN, loss_chunk=config.perf.loss_chunk)
    asked = dataclasses.replace(config.perf, remat="full", scan_unroll=0, compiler_options=("a=b=c",))
    perf = resolve_perf(dataclasses.replace(config, perf=asked), mesh)
    assert (perf.remat, perf.scan_unroll, compiler_options(perf)) == ("full", 0, {"a": "b=c"})


def test_a_tpu_rounds_its_logits_and_takes_short_chunks_and_whole_tiles_of_slots():
    config = presets.get("vanilla-360m").config
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=16))
    perf = resolve_perf(config, _mesh("a TPU", "tpu"))
    assert (perf.loss_chunk, perf.logits_dtype, perf.slot_multiple) == (64, "bfloat16", 16)
    options = [
        resolve_perf(config, _mesh(kind, "tpu")).compiler_options for kind in ("a TPU", "TPU v6e", "TPU v5 lite")
    ]
    assert options == [(), *(tuple(COMPILER_OPTIONS[chip]) for chip in ("v6e", "v5e"))]
    single = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype="float32"))
    assert resolve_perf(single, _mesh("a TPU", "tpu")).logits_dtype == "float32"


def test_swiglu_within_products_where_device_widths_and_remat_allow_it(monkeypatch):
    config = presets.get("vanilla-360m").config
    monkeypatch.setattr(perf_module, "resolve_backend", lambda *_: "xla")
    monkeypatch.setattr(swiglu_hopper, "is_hopper", lambda: True)

    def fusion(kind: str = "gpu", tensor: int = 1, **changes: Any):
        changed = dataclasses.replace(
            config,
            mesh=dataclasses.replace(config.mesh, tensor=tensor),
            perf=dataclasses.replace(config.perf, **changes),
        )
        return resolve_perf(changed, _mesh("a GPU", kind)).fusion

    assert fusion() == fusion(remat="full") == fusion(tensor=2) == "mosaic"
    assert fusion(remat="names") == fusion(remat="dots") == fusion(tensor=4) == "triton"  # 640 is no multiple of 256
    assert fusion("tpu") == "xla"
    assert fusion(fusion="mosaic") == "mosaic"
    batch = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=32))
    mesh = _mesh("a GPU", "gpu", 75 << 30)  # too little for `none`: `names` by itself, `full` beside these kernels
    for asked, remat, chosen in (("auto", "names", "triton"), ("mosaic", "full", "mosaic")):
        perf = resolve_perf(dataclasses.replace(batch, perf=dataclasses.replace(config.perf, fusion=asked)), mesh)
        assert (perf.remat, perf.fusion) == (remat, chosen)
    refused: tuple[tuple[str, dict[str, Any]], ...] = (("tpu", {}), ("gpu", {"remat": "names"}), ("gpu", {"tensor": 4}))
    for kind, changes in refused:
        with pytest.raises(UserError, match=r"perf.fusion='mosaic' needs a Hopper GPU"):
            fusion(kind, fusion="mosaic", **changes)
    monkeypatch.setattr(swiglu_hopper, "is_hopper", lambda: False)
    assert fusion() == "triton"
    monkeypatch.setattr(pallas_triton, "plt", None)
    assert fusion() == "xla"
    with pytest.raises(UserError, match=r"perf.fusion='triton': this version of JAX has no Triton backend"):
        fusion(fusion="triton")
    monkeypatch.setattr(swiglu_hopper, "is_hopper", lambda: True)
    assert fusion() == "mosaic"


def test_a_cpu_refuses_kernels_for_hopper():
    config = presets.get("debug").config
    config = dataclasses.replace(config, perf=dataclasses.replace(config.perf, fusion="mosaic"))
    with pytest.raises(UserError, match=r"perf.fusion='mosaic' needs a Hopper GPU.*not device='cpu'"):
        resolve_perf(config, make_mesh(config.mesh, jax.devices()[:1]))


def test_compiler_options_are_what_xla_takes():
    asked = ("xla_cpu_enable_fast_math=false", "xla_embed_ir_in_executable=True", "xla_dump_to=")
    options = compiler_options(dataclasses.replace(PLAIN, compiler_options=asked))
    assert options == {"xla_cpu_enable_fast_math": False, "xla_embed_ir_in_executable": True, "xla_dump_to": ""}
    jax.jit(lambda x: x).lower(1.0).compile(compiler_options=dict(options))


def test_rematerialisation_is_the_least_that_fits_and_on_tpus_the_fastest():
    config = presets.get("vanilla-360m").config
    cases = ((16, "none", "attention"), (32, "names", "attention"), (160, "full", "attention"), (240, "full", "full"))
    for rows, *wanted in cases:
        batch = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=rows))
        assert [resolve_perf(batch, _mesh("a chip", kind, 75 << 30)).remat for kind in ("gpu", "tpu")] == wanted
    kinds: tuple[RematPolicy, ...] = ("none", "dots", "names", "projections", "attention", "full")
    sizes = [activation_bytes(config.model, 16, remat) for remat in kinds]
    assert sizes == sorted(sizes, reverse=True)
    assert resolve_perf(config, _mesh("unheard of", "tpu")).remat == "none"


def test_a_block_that_is_kept_whole_counts_as_memory():
    config = presets.get("mor-1.7b-expert-r3").config
    config = dataclasses.replace(
        config,
        mesh=dataclasses.replace(config.mesh, fsdp=16),
        train=dataclasses.replace(config.train, batch_size=2, accumulation=1),
    )
    block = 2 * block_parameters(config.model)
    needed = (
        activation_bytes(config.model, 2, "attention")
        + state_bytes(config, 16)
        + 3 * 4 * 4096 * config.model.vocab_size
    )
    for whole_block, spare, wanted in ((False, 0, "attention"), (True, 0, "full"), (True, block, "attention")):
        perf = dataclasses.replace(config.perf, whole_block=whole_block)
        mesh = _mesh("a chip", "tpu", int((needed + spare) / 0.85) + 100)
        assert resolve_perf(dataclasses.replace(config, perf=perf), mesh).remat == wanted


def test_slots_without_a_token_change_neither_loss_nor_gradient():
    model = ModelConfig(
        vocab_size=32,
        num_layers=4,
        d_model=16,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        d_ff=16,
        context_length=21,
        dtype="float32",
        recursion=RecursionConfig(num_recursions=2, sharing="middle_cycle", kv_strategy="shared"),
        routing=RoutingConfig(kind="expert"),
    )
    config = Config(model=model, train=TrainConfig(batch_size=2, steps=100))
    state = init_train_state(config, make_mesh(config.mesh, jax.devices()[:1]))
    batch = {name: jnp.asarray(x) for name, x in random_batch(model, 2, packed=False, seed=0).items()}

    def run(multiple: int) -> Any:
        perf = PerfConfig(slot_multiple=multiple, loss_chunk=16)
        with_slots = dataclasses.replace(config, perf=perf)  # k = 10 of 21, in 16 slots
        loss = lambda p: loss_fn(with_slots, p, state.router_bias_R, batch, state.key, None)[0]  # noqa: E731
        return jax.jit(jax.value_and_grad(loss))(state.params)

    for want, got in zip(*(jax.tree.leaves(run(multiple)) for multiple in (1, 8)), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-6)
