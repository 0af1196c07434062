"""Hugging Face Llama folders: bitwise round trips, unrolled recursions, memory, and every misfit named at once."""

import dataclasses
import json
import tracemalloc

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mor_jax.config import ModelConfig, RecursionConfig, RelaxationConfig, RoutingConfig
from mor_jax.errors import UserError
from mor_jax.interop import llama
from mor_jax.interop.assemble import leaf_shapes
from mor_jax.interop.tensor_files import INDEX, TensorFiles, write_shards
from mor_jax.model.forward import forward
from mor_jax.model.transformer import init_params

TINY = ModelConfig(
    vocab_size=37, num_layers=4, d_model=16, num_heads=4, num_kv_heads=2, head_dim=8, d_ff=24, context_length=16,
    dtype="float32", init_std=0.3,
)  # fmt: skip
TOKENS_BT = np.random.default_rng(0).integers(0, 37, (2, 9)).astype(np.int32)


def random_params(model: ModelConfig) -> dict:
    shapes = jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))
    generator = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: generator.normal(size=leaf.shape, scale=0.3).astype(np.float32), shapes)


def _logits(model: ModelConfig, params) -> jax.Array:
    return jax.jit(lambda params: forward(model, params, TOKENS_BT).logits)(params)


def write(folder, model: ModelConfig, params, **options) -> None:
    (folder / "config.json").write_text(json.dumps(llama.describe_config(model)))
    write_shards(folder, llama.written_shapes(model), llama.unrolled(model, params), **options)


@pytest.mark.parametrize("tied", [True, False])
def test_ours_to_llama_to_ours_is_bitwise_over_several_shards(tied, tmp_path):
    model = dataclasses.replace(TINY, tie_embeddings=tied)
    params = random_params(model)
    write(tmp_path, model, params, shard_bytes=4000)
    assert (tmp_path / INDEX).is_file() and len(list(tmp_path.glob("model-*.safetensors"))) > 3
    loaded_model, loaded = llama.load(tmp_path)
    assert loaded_model == model
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_bfloat16_is_widened_and_rotary_buffers_are_ignored(tmp_path):
    params = random_params(TINY)
    write(tmp_path, TINY, params)
    path = tmp_path / "model.safetensors"
    tensors = {name: value.astype(ml_dtypes.bfloat16) for name, value in load_file(path).items()}
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    save_file(tensors, path)
    _, loaded = llama.load(tmp_path)
    rounded = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float32), params)
    jax.tree.map(np.testing.assert_array_equal, loaded, rounded)


@pytest.mark.parametrize(
    ("sharing", "layers", "norms", "rank"),
    [("cycle", 4, True, 0), ("middle_cycle", 7, False, 2), ("sequence", 4, True, 2), ("middle_sequence", 6, False, 0)],
)
def test_unrolled_recursions_compute_the_same(sharing, layers, norms, rank, tmp_path):
    relaxation = RelaxationConfig(lora_rank=rank, lora_scale=0.5)
    recursion = RecursionConfig(2, sharing, share_norms=norms, relaxation=relaxation)
    model = dataclasses.replace(TINY, num_layers=layers, recursion=recursion)
    params = random_params(model)
    write(tmp_path, model, params)
    vanilla, unrolled = llama.load(tmp_path)
    assert vanilla.recursion.sharing == "none" and vanilla.num_layers == model.unrolled_depth
    logits, expected = _logits(vanilla, unrolled), _logits(model, params)
    np.testing.assert_allclose(logits, expected, atol=2e-5 * float(np.abs(expected).max()))


def test_the_host_holds_one_tensor_at_a_time(tmp_path):
    """Read onto a device, a model of eight shards never takes 1.5 times the largest shard of host memory."""
    model = dataclasses.replace(TINY, num_layers=8, d_model=128, d_ff=512, vocab_size=512)
    params = random_params(model)
    shard_bytes = 1 << 20
    write(tmp_path, model, params, shard_bytes=shard_bytes)
    largest = max(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shardings = jax.tree.map(lambda _: device, params)
    llama.load(tmp_path, shardings=shardings)  # compiles
    tracemalloc.start()
    _, loaded = llama.load(tmp_path, shardings=shardings)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(params)) > 5 * largest
    assert peak < 1.5 * largest


def test_every_misfit_is_named_at_once(tmp_path):
    write(tmp_path, TINY, random_params(TINY))
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.norm.weight"]
    tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"][:-1]
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].astype(np.int32)
    tensors["model.extra.bias"] = np.zeros(2, np.float32)
    save_file(tensors, path)
    with pytest.raises(UserError) as caught:
        llama.load(tmp_path)
    for part in (
        "4 tensors do not fit",
        "missing model.norm.weight",
        "unknown model.extra.bias",
        "misshaped model.layers.1.mlp.up_proj.weight: (23, 16), not (24, 16)",
        "wrong dtype of model.embed_tokens.weight: I32",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type='gpt2' is not 'llama'"),
        ({"attention_bias": True}, "attention_bias=True"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": None},
            r"rope_scaling.type='linear': rotary scaling is not supported",
        ),
        ({"num_attention_heads": "x"}, "num_attention_heads='x' is not a positive integer"),
        ({"num_attention_heads": 0, "head_dim": None}, "num_attention_heads=0 is not a positive integer"),
        ({"head_dim": 8.0}, "head_dim=8.0 is not a positive integer"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps='1e-5' is not a positive number"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps=inf is not a positive number"),
        ({"initializer_range": None}, "initializer_range=None is not a positive number"),
        ({"vocab_size": None}, "vocab_size=None is not a positive integer"),
        ({"rope_theta": None}, "rope_theta=None is not a positive number"),
        ({"rope_theta": "1e4"}, "rope_theta='1e4' is not a positive number"),
        ({"rope_parameters": {"rope_theta": None}}, r"rope_parameters.rope_theta=None is not a positive number"),
        ({"rope_parameters": {"rope_theta": True}}, r"rope_parameters.rope_theta=True is not a positive number"),
        ({"rope_parameters": [1]}, r"rope_parameters=\[1\] is not an object"),
        ({"rope_scaling": "linear"}, "rope_scaling='linear' is not an object"),
        ({"rope_scaling": {"factor": 2.0}}, "rope_scaling={'factor': 2.0} names no rope_type"),
        ({"rope_scaling": {"rope_type": "llama3"}}, r"rope_scaling.rope_type='llama3', although .*'default': rotary"),
        ({"rope_scaling": {"rope_type": "default", "type": "yarn"}}, r"rope_scaling.type='yarn', although"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2}}, r"rope_parameters.rope_type='linear': rotary"),
        ({"rope_theta": 5e5}, r"rope_theta=500000.0 and rope_parameters.rope_theta=10000.0 contradict each other"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"tie_word_embeddings": None}, "tie_word_embeddings=None is neither true nor false"),
        ({"mlp_bias": None}, "mlp_bias=None: only False is supported"),
        ({"hidden_size": None}, None),
    ],
)
def test_configurations_that_cannot_be_read_are_refused(change, message):
    values = llama.describe_config(TINY) | change
    if message is None:
        del values["hidden_size"], values["vocab_size"]
        message = "vocab_size, hidden_size missing"
    with pytest.raises(UserError, match=message):
        llama.parse_config(values)


def test_either_generation_of_rotary_keys_is_read():
    values = llama.describe_config(dataclasses.replace(TINY, rope_theta=5e5))
    for ignored in ("rope_theta", "rope_parameters"):
        assert llama.parse_config({k: v for k, v in values.items() if k != ignored}).rope_theta == 5e5


def test_models_that_llama_lacks_are_refused_with_all_reasons():
    model = dataclasses.replace(
        TINY,
        recursion=RecursionConfig(2, "cycle", kv_strategy="shared", relaxation=RelaxationConfig(encoding=True)),
        routing=RoutingConfig("expert"),
    )
    with pytest.raises(UserError, match=r"has no router.*keys of its own.*multiplies its output"):
        llama.check_expressible(model)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"holds no \*.safetensors"),
        ({"model.safetensors": b"not a tensor file"}, "not a readable safetensors file"),
        ({INDEX: b"{}"}, "not an index of shards"),
        ({INDEX: b'{"weight_map": {"a": "one.safetensors"}}'}, "names shards that are not there: one.safetensors"),
    ],
)
def test_files_that_cannot_be_read_are_one_message(files, message, tmp_path):
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message):
        TensorFiles(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("recursive", [False, True])
def test_transformers_computes_the_same_logits(recursive, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = TINY
    if recursive:
        model = dataclasses.replace(TINY, num_layers=8, recursion=RecursionConfig(3, "middle_cycle"))
    params = random_params(model)
    write(tmp_path, model, params)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        logits = theirs(torch.tensor(TOKENS_BT)).logits.numpy()
    expected = np.asarray(_logits(model, params))
    error = np.abs(logits - expected).max()
    print(f"max error {error:.2g} of logits up to {np.abs(expected).max():.3g}")
    assert error <= 1e-5 * np.abs(expected).max()


def test_shapes_of_a_real_layout():
    """SmolLM2-135M: 30 layers, 9 query and 3 key/value heads of 64."""
    values = {
        "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192, "rope_theta": 100000, "tie_word_embeddings": True,
    }  # fmt: skip
    shapes = leaf_shapes(llama.parse_config(values))
    assert shapes[("block", "attention", "key_value")] == (30, 576, 2, 3, 64)
