"""PyTorch checkpoint folders: files of every age and shape that weights-only reading allows, and what lies beside."""

import json
import logging

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file
from test_llama import TINY, random_params

from mor_jax.errors import UserError
from mor_jax.interop import llama
from mor_jax.interop.tensor_files import INDEX, TensorFiles

PARAMS = random_params(TINY)
TENSORS = dict(llama.unrolled(TINY, PARAMS))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(llama.describe_config(TINY)))
    return tmp_path


def same(folder) -> None:
    _, loaded = llama.load(folder)
    jax.tree.map(np.testing.assert_array_equal, loaded, PARAMS)


def halves() -> tuple[dict, dict]:
    names = sorted(TENSORS)
    return {name: TENSORS[name] for name in names[:9]}, {name: TENSORS[name] for name in names[9:]}


def test_other_safetensors_are_passed_over_with_a_word(folder, caplog):
    caplog.set_level(logging.WARNING)
    save_file(TENSORS, folder / "model.safetensors")
    for name in ("adapter_model.safetensors", "optimizer.safetensors", "model.fp16.safetensors"):
        save_file({"x": np.zeros(1, np.float32)}, folder / name)
    (folder / "training_args.bin").write_bytes(b"pickle")
    same(folder)
    assert "passed over beside the model: adapter_model.safetensors, model.fp16.safetensors, " in caplog.text
    assert "optimizer.safetensors, training_args.bin" in caplog.text


def test_shards_without_an_index_and_a_file_of_another_name(folder):
    for number, half in enumerate(halves()):
        save_file(half, folder / f"model-{number + 1:05d}-of-00002.safetensors")
    save_file({"x": np.zeros(1, np.float32)}, folder / "adapter_model.safetensors")
    same(folder)
    for path in folder.glob("model-*"):
        path.unlink()
    save_file(TENSORS, folder / "consolidated.safetensors")
    same(folder)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "../model.safetensors"}, "names files of other folders"),
        ({"a": 3}, "not an index of shards"),
        ([], "not an index of shards"),
    ],
)
def test_an_index_of_anything_else(weight_map, message, folder):
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match=message):
        TensorFiles(folder)


def as_saved(kind: str, folder, torch) -> None:
    tensors = {name: torch.tensor(value) for name, value in TENSORS.items()}
    file = folder / "pytorch_model.bin"
    if kind == "parameters":
        torch.save({name: torch.nn.Parameter(value) for name, value in tensors.items()}, file)
    elif kind == "legacy":
        torch.save(tensors, file, _use_new_zipfile_serialization=False)
    elif kind == "trainer":
        torch.save(tensors, file)
        torch.save({"state": {}, "param_groups": [{"lr": 0.1}]}, folder / "optimizer.pt")
        torch.save({"last_epoch": 1}, folder / "scheduler.pt")
        (folder / "training_args.bin").write_bytes(b"not a pickle of tensors")
        (folder / "rng_state.pth").write_bytes(b"neither")
    elif kind in ("sharded", "indexed"):
        for number, half in enumerate(halves()):
            torch.save({n: tensors[n] for n in half}, folder / f"pytorch_model-{number + 1:05d}-of-00002.bin")
        if kind == "indexed":
            torch.save({"x": torch.zeros(1)}, folder / "pytorch_model-00001-of-00001.bin")  # of an older save
            shards = {n: f"pytorch_model-{i + 1:05d}-of-00002.bin" for i, half in enumerate(halves()) for n in half}
            (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": shards}))
    elif kind == "nested":
        torch.save({"epoch": 3, "state_dict": tensors}, file)
    elif kind == "views":
        whole = {name: torch.stack([value, value], dim=-1) for name, value in tensors.items()}
        torch.save({name: value[..., 0] for name, value in whole.items()}, file)


@pytest.mark.parametrize("kind", ["parameters", "legacy", "trainer", "sharded", "indexed", "nested", "views"])
def test_pytorch_files_of_every_kind_open(kind, folder):
    as_saved(kind, folder, pytest.importorskip("torch"))
    same(folder)


def test_bfloat16_parameters_are_widened(folder):
    torch = pytest.importorskip("torch")
    tensors = {name: torch.nn.Parameter(torch.tensor(value).bfloat16()) for name, value in TENSORS.items()}
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    _, loaded = llama.load(folder)
    expected = torch.tensor(PARAMS["embedding"]["embedding"]).bfloat16().float().numpy()
    np.testing.assert_array_equal(loaded["embedding"]["embedding"], expected)


def test_what_is_no_dictionary_of_plain_tensors_is_one_message(folder):
    torch = pytest.importorskip("torch")
    for value in ([torch.zeros(1)], {1: torch.zeros(1)}, {"a": 3}, {"a": torch.zeros(2, 2).to_sparse()}):
        torch.save(value, folder / "pytorch_model.bin")
        with pytest.raises(UserError, match=r"not a dictionary of tensors by name|not plain tensors: a"):
            llama.load(folder)


def test_pt_files_count_in_a_released_folder_alone(folder):
    torch = pytest.importorskip("torch")
    torch.save({"x": torch.zeros(1)}, folder / "model.pt")
    torch.save({"last_epoch": 1}, folder / "scheduler.pt")
    with pytest.raises(UserError, match=r"holds no \*.safetensors or pytorch_model\*.bin file"):
        TensorFiles(folder)
    assert TensorFiles(folder, pt=True).names() == ["x"]
