"""Leaves read on demand, files written tensor by tensor, and what converted folders open as."""

import dataclasses
import json
import tracemalloc

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_llama import TINY, random_params, write

from mor_jax.config import RecursionConfig, RoutingConfig
from mor_jax.data.tokenizer import Tokenizer
from mor_jax.errors import UserError
from mor_jax.interop import convert, llama, official
from mor_jax.interop import weights_folder as weights
from mor_jax.interop.assemble import LazyLeaf
from mor_jax.interop.sources import open_model, open_run
from mor_jax.interop.tensor_files import TensorFiles, write_shards

EXPERT = dataclasses.replace(
    TINY, num_layers=8, recursion=RecursionConfig(3, "middle_cycle"), routing=RoutingConfig("expert")
)
PUBLISHED = """
name: example
num_warmup_steps: 86
gradient_accumulation_steps: null
recursive: {enable: true, base_depth: null, num_recursion: 3, sharing: middle_cycle, ln_share: true}
kv_sharing: {enable: true, base_depth: null, num_recursion: null, sharing: null}
relaxation: {enable: false, method: lora}
mor:
  enable: true
  type: expert
  capacity: null
  rand_router: false
  router_type: linear
  z_loss: false
  z_coeff: 0.001
  temp: 1.0
  expert: {cap_warmup_step: null, router_func: sigmoid, alpha: 0.1, sampling: aux_loss, coeff: 0.001, gating: weighted}
  token: {router_func: sigmoid, alpha: 0.1, balancing: loss, coeff: 0.001, u: 0.001, gating: weighted}
"""


def test_leaves_read_on_demand_are_the_leaves(tmp_path):
    params = random_params(TINY)
    write(tmp_path, TINY, params, shard_bytes=4000)
    _, lazy = llama.load(tmp_path, lazy=True)
    assert all(isinstance(leaf, LazyLeaf) for leaf in jax.tree.leaves(lazy))
    jax.tree.map(lambda leaf, expected: np.testing.assert_array_equal(np.asarray(leaf), expected), lazy, params)
    gate_up, expected = lazy["block"]["ffn"]["gate_up"], params["block"]["ffn"]["gate_up"]
    for index in (2, -1, (1, slice(None), 0), (3, slice(2, 4)), slice(1, 3), ()):
        np.testing.assert_array_equal(gate_up[index], expected[index])


def test_bfloat16_checkpoints_come_back_bit_for_bit(tmp_path):
    params = random_params(TINY)
    params["final_norm"]["scale"][:2] = (-0.0, 0.0)
    (tmp_path / "hf").mkdir()
    write(tmp_path / "hf", TINY, params, dtype="bfloat16")
    convert.write(open_model(tmp_path / "hf", lazy=True), "mor", tmp_path / "ours")
    convert.write(open_model(tmp_path / "ours", lazy=True), "hf", tmp_path / "again", dtype="bfloat16")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "again"))
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert value.dtype == ml_dtypes.bfloat16 and after[name].tobytes() == value.tobytes()
    assert json.loads((tmp_path / "again" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    with pytest.raises(UserError, match="dtype='bfloat16' is for target 'hf'"):
        convert.write(open_model(tmp_path / "hf"), "mor", tmp_path / "other", dtype="bfloat16")


def test_a_conversion_holds_less_than_the_largest_shard_and_a_half(tmp_path):
    model = dataclasses.replace(TINY, num_layers=8, d_model=128, d_ff=512, vocab_size=512)
    (tmp_path / "hf").mkdir()
    write(tmp_path / "hf", model, random_params(model), shard_bytes=2 << 20)
    largest = max(path.stat().st_size for path in (tmp_path / "hf").glob("*.safetensors"))
    convert.write(open_model(tmp_path / "hf", lazy=True), "mor", tmp_path / "warm")
    tracemalloc.start()
    convert.write(open_model(tmp_path / "hf", lazy=True), "mor", tmp_path / "ours")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "ours" / "model.safetensors").stat().st_size > 3 * largest
    assert peak < 1.5 * largest


def test_a_tied_head_of_other_values_is_refused(tmp_path):
    write(tmp_path, TINY, random_params(TINY))
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors, path)
    assert llama.load(tmp_path)[0] == TINY
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, path)
    with pytest.raises(UserError, match=r"untied lm_head.weight differs from model.embed_tokens.weight"):
        llama.load(tmp_path)


def test_written_files_are_aligned_and_pass_the_library(tmp_path):
    arrays = {"a": np.arange(3, dtype=np.float32), "long name": np.ones((2, 2), np.float32)}
    write_shards(tmp_path, {name: value.shape for name, value in arrays.items()}, iter(arrays.items()))
    data = (tmp_path / "model.safetensors").read_bytes()
    assert int.from_bytes(data[:8], "little") % 8 == 0
    loaded = load_file(tmp_path / "model.safetensors")
    assert loaded.keys() == arrays.keys()
    assert all(np.array_equal(loaded[name], value) for name, value in arrays.items())


def test_dtypes_that_no_weight_has_are_named_not_read(tmp_path):
    save_file({"x": np.zeros(2, np.int16)}, tmp_path / "model.safetensors")
    files = TensorFiles(tmp_path)
    assert (files.shape("x"), files.dtype("x")) == ((2,), "I16")
    with pytest.raises(UserError, match="x has dtype I16, which cannot be read"):
        files.read("x")


def test_converted_weights_open_as_a_run_does(tmp_path):
    params = random_params(EXPERT)
    weights.save(tmp_path, EXPERT, params, None, origin="a test")
    with pytest.raises(UserError, match=r"tokenizer.json: not a readable tokenizer"):
        open_run(tmp_path)
    Tokenizer.bytes_level().save(tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match=r"vocab_size=257, more than model.vocab_size=37"):
        open_run(tmp_path)
    larger = dataclasses.replace(EXPERT, vocab_size=257)
    weights.save(tmp_path, larger, random_params(larger), Tokenizer.bytes_level(), origin="a test")
    run = open_run(tmp_path)
    assert (run.config.model, run.step, run.tokenizer.kind) == (larger, 0, "bytes")
    assert run.router_bias_R.shape == (3,)
    jax.tree.map(np.testing.assert_array_equal, run.params, random_params(larger))
    values = json.loads((tmp_path / "config.json").read_text())
    assert values["rope_theta"] == values["rope_parameters"]["rope_theta"] == larger.rope_theta


def _released(folder, model, text: str) -> None:
    description, state = official.export(model, random_params(model))
    official.write_configuration(folder, description)
    (folder / "config.yaml").write_text(text)
    save_file(state, folder / "model.safetensors")


def test_the_published_form_of_the_configuration_is_read(tmp_path):
    shared = dataclasses.replace(EXPERT, recursion=dataclasses.replace(EXPERT.recursion, kv_strategy="shared"))
    _released(tmp_path, shared, PUBLISHED)
    model, params = official.read(tmp_path)
    expected = dataclasses.replace(shared, routing=dataclasses.replace(shared.routing, capacity_warmup_steps=86))
    assert dataclasses.replace(model, init_std=TINY.init_std) == expected
    jax.tree.map(np.testing.assert_array_equal, params, random_params(shared))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("relaxation: {enable: false", "relaxation: {enable: true", "relaxation.method='lora'"),
        ("rand_router: false", "rand_router: true", "mor.rand_router=true"),
        ("num_warmup_steps: 86", "num_warmup_steps: null", "are both null"),
        ("type: expert", "type: both", "mor.type='both' is not"),
    ],
)
def test_released_runs_that_cannot_be_imported_are_refused(old, new, message, tmp_path):
    _released(tmp_path, EXPERT, PUBLISHED.replace(old, new))
    with pytest.raises(UserError, match=message):
        official.read(tmp_path)


@pytest.mark.parametrize(
    ("recursive", "kv_sharing", "mor", "message"),
    [
        (
            "recursive: {enable: false}\n",
            True,
            False,
            "kv_sharing without recursive: layers with parameters",
        ),
        ("", True, False, "kv_sharing without recursive"),
        ("recursive: null\n", True, True, "kv_sharing without recursive"),
        ("", False, True, "mor without recursive: a router needs recursions"),
        ("", False, False, None),
    ],
)
def test_sections_without_parameter_sharing(recursive, kv_sharing, mor, message, tmp_path):
    lines = [line for line in PUBLISHED.splitlines(keepends=True) if not line.startswith("recursive:")]
    text = recursive + "".join(lines)
    text = text if kv_sharing else text.replace("kv_sharing: {enable: true", "kv_sharing: {enable: false")
    text = text if mor else text.replace("mor:\n  enable: true", "mor:\n  enable: false")
    _released(tmp_path, TINY, text)
    if message is None:
        jax.tree.map(np.testing.assert_array_equal, official.read(tmp_path)[1], random_params(TINY))
        return
    with pytest.raises(UserError, match=message):
        official.read(tmp_path)
