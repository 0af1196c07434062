"""What a command parses of an engine needs no jax; sizes left open follow from the model."""

import subprocess
import sys

from decode_examples import decode_model, model_config

from mor_jax.infer.engine_options import EngineOptions
from mor_jax.infer.engine_shape import engine_shape


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
