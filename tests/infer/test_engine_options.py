"""What a command parses of an engine needs no jax; sizes left open follow from the model."""

import dataclasses
import subprocess
import sys

import jax
import pytest
from decode_examples import decode_model, model_config

from mor_jax.infer.dispatch_program import GPU_OPTIONS, dispatch_program
from mor_jax.infer.engine import Engine
from mor_jax.infer.engine_options import EngineOptions
from mor_jax.infer.engine_shape import engine_shape
from mor_jax.infer.prefill_chunk import reads_alone, with_prefill_sizes
from mor_jax.infer.stages import dispatch


def test_options_of_the_commands_are_there_without_jax():
    modules = "mor_jax.infer.engine_options", "mor_jax.bench.serving_settings", "mor_jax.serve.server_options"
    code = f"import sys, {', '.join(modules)}; print(sorted({{'jax', 'flax', 'numpy'}} & set(sys.modules)))"
    outcome = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert outcome.stdout == "[]\n"


def test_sizes_left_open_follow_from_the_model():
    routed, vanilla = decode_model(model_config()), decode_model(model_config("none", "none"))
    shape = engine_shape(routed, EngineOptions(max_running=9, max_length=None))
    assert shape.max_length == routed.config.context_length
    assert (shape.block_slots, shape.exit_slots, shape.exit_at, shape.places) == (6, 3, 3, 11)
    shape = engine_shape(vanilla, EngineOptions(max_running=9, max_length=20))
    assert (shape.max_length, shape.block_slots, shape.exit_slots, shape.exit_at) == (20, 9, 9, 9)


@pytest.mark.parametrize(
    ("platform", "asked", "max_length", "context", "chunk"),
    [
        ("gpu", None, 4096, 65536, 128), ("gpu", None, 4097, 512, 1024), ("gpu", None, None, 32768, 1024),
        ("gpu", None, None, 2048, 128), ("gpu", 16, None, 32768, 16), ("cpu", None, None, 32768, 128),
        ("tpu", None, 32768, 2048, 128), ("tpu", 512, 32768, 2048, 512),
    ],
)  # fmt: skip
def test_the_chunk_follows_from_device_and_length(platform, asked, max_length, context, chunk):
    options = EngineOptions(prefill_chunk=asked, max_length=max_length, prefill_rows=4)
    assert with_prefill_sizes(options, platform, context) == dataclasses.replace(options, prefill_chunk=chunk)


@pytest.mark.parametrize(
    ("rows", "max_length", "context", "alone"),
    [
        (4, 4096, 65536, False), (4, 4097, 512, True), (2, None, 32768, True), (1, None, 32768, False),
        (8, 512, 512, True),
    ],
)  # fmt: skip
def test_long_texts_and_many_rows_have_a_program_of_one_row(rows, max_length, context, alone):
    assert reads_alone(EngineOptions(prefill_rows=rows, max_length=max_length), context) == alone


def test_the_compiler_knows_what_a_gpu_is_asked_for():
    assert dispatch_program("cpu", 32) is dispatch_program("tpu", 32) is dispatch_program("gpu", 8) is dispatch
    assert dispatch_program("gpu", 32) is not dispatch
    doubled = jax.jit(lambda x: 2 * x).lower(1.0).compile(compiler_options=dict(GPU_OPTIONS))
    assert doubled(1.0) == 2.0
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option"):
        jax.jit(lambda x: 2 * x).lower(1.0).compile(compiler_options={"xla_gpu_no_such_option": True})


@pytest.mark.parametrize(
    ("running", "longest", "asked", "rows"),
    [(1, 2048, None, 4), (39, 2048, None, 4), (256, 2048, None, 32), (256, 2048, 2, 2), (256, 8192, None, 4)],
)
def test_as_many_prompts_are_read_as_sequences_end(running, longest, asked, rows):
    options = EngineOptions(max_running=running, max_length=longest, prefill_rows=asked)
    options = with_prefill_sizes(options, "gpu", longest)
    assert options.prefill_rows == rows


def test_an_engine_settles_its_chunk():
    options = Engine(decode_model(model_config()), EngineOptions(max_length=20)).options
    assert (options.prefill_chunk, options.prefill_rows) == (128, 4)
