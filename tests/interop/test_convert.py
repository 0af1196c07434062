"""Folders of every format: detection, conversion, checks, and refusals that leave nothing behind."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_llama import TINY, random_params, write

from mor_jax.cli import main
from mor_jax.config import RecursionConfig, RelaxationConfig, RoutingConfig
from mor_jax.data.tokenizer import Tokenizer
from mor_jax.errors import UserError
from mor_jax.interop import official
from mor_jax.interop import weights_folder as weights
from mor_jax.interop.sources import detect, open_model

EXPERT = dataclasses.replace(
    TINY, num_layers=8, recursion=RecursionConfig(3, "middle_cycle"), routing=RoutingConfig("expert")
)
LOSS_FREE = dataclasses.replace(
    EXPERT, routing=RoutingConfig("token", score="softmax", balancing="loss_free", capacity_slack=4.0)
)
RELAXED = dataclasses.replace(
    EXPERT, recursion=RecursionConfig(3, "middle_cycle", relaxation=RelaxationConfig(lora_rank=2, encoding=True))
)


def _equal(a, b) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("model", [TINY, EXPERT, LOSS_FREE, RELAXED])
def test_our_weights_round_trip_bitwise_with_tokenizer_and_card(model, tmp_path):
    params = random_params(model)
    if model is LOSS_FREE:
        params["router_state"] = {"bias": np.array([0.5, 0.0, -0.5], np.float32)}
    if model is EXPERT:
        params["router_state"] = {"boundaries": np.array([-np.inf, 0.25, -0.5], np.float32)}
    weights.save(tmp_path, model, params, Tokenizer.bytes_level(), origin="a test")
    loaded = open_model(tmp_path)
    assert (loaded.kind, loaded.model) == ("weights", model)
    _equal(loaded.params, params)
    assert loaded.tokenizer is not None and loaded.tokenizer.hash == Tokenizer.bytes_level().hash
    assert "Origin of the weights: a test." in (tmp_path / "README.md").read_text()


def test_ours_to_official_folder_to_ours(tmp_path, capsys):
    params = random_params(EXPERT)
    (tmp_path / "ours").mkdir()
    weights.save(tmp_path / "ours", EXPERT, params, None, origin="a test")
    out = tmp_path / "official"
    assert main(["convert", str(tmp_path / "ours"), "--to", "official", "--out", str(out), "--check"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("logits differ by at most 0,") and printed[-1] == str(out)
    assert detect(out) == "official"
    model, loaded = official.read(out)
    assert dataclasses.replace(model, init_std=EXPERT.init_std) == EXPERT
    _equal(loaded, params)


def test_llama_to_ours_and_back_is_bitwise(tmp_path, capsys):
    (tmp_path / "hf").mkdir()
    write(tmp_path / "hf", TINY, random_params(TINY))
    assert main(["convert", str(tmp_path / "hf"), "--out", str(tmp_path / "ours"), "--check"]) == 0
    assert main(["convert", str(tmp_path / "ours"), "--to", "hf", "--out", str(tmp_path / "again")]) == 0
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "again"))
    assert before.keys() == after.keys()
    assert all(before[name].tobytes() == after[name].tobytes() for name in before)
    assert json.loads((tmp_path / "again" / "config.json").read_text())["rope_parameters"]["rope_theta"] == 10_000.0


def test_a_dry_run_prints_the_mapping_and_writes_nothing(tmp_path, capsys):
    (tmp_path / "hf").mkdir()
    write(tmp_path / "hf", TINY, random_params(TINY))
    assert main(["convert", str(tmp_path / "hf"), "--to", "hf", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "model.layers.2.self_attn.v_proj.weight  <-  block/attention/key_value[2][:][1]" in lines
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_refusals_are_one_message_with_code_2_and_write_nothing(tmp_path, capsys):
    (tmp_path / "ours").mkdir()
    weights.save(tmp_path / "ours", EXPERT, random_params(EXPERT), None, origin="a test")
    for arguments, message in (
        ([str(tmp_path / "ours"), "--to", "hf", "--out", str(tmp_path / "x")], "Llama has no router"),
        ([str(tmp_path / "none"), "--out", str(tmp_path / "x")], "is no folder"),
        ([str(tmp_path), "--out", str(tmp_path / "x")], "holds no model"),
        ([str(tmp_path / "ours"), "--out", str(tmp_path / "ours")], "exists already"),
        ([str(tmp_path / "ours")], "--out is missing"),
    ):
        assert main(["convert", *arguments]) == 2
        assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours"]


def test_a_damaged_folder_names_every_tensor(tmp_path):
    weights.save(tmp_path, EXPERT, random_params(EXPERT), None, origin="a test")
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    del tensors["router.kernel"], tensors["block.1.ffn.down"]
    save_file(tensors, path)
    with pytest.raises(UserError, match=r"2 tensors do not fit the model: missing block.1.ffn.down; missing router"):
        open_model(tmp_path)


def test_released_folders_need_one_yaml_with_its_sections(tmp_path):
    (tmp_path / "model.safetensors").touch()
    save_file({"x": np.zeros(1, np.float32)}, tmp_path / "model.safetensors")
    for text, message in (
        ("name: x\n", "has none of the sections recursive, kv_sharing, mor"),
        ("recursive: 3\n", "recursive=3: not a section"),
        ("recursive: {enable: false}\n", r"config\.json: not a readable"),
    ):
        (tmp_path / "a.yaml").write_text(text)
        with pytest.raises(UserError, match=message):
            official.read(tmp_path)
    (tmp_path / "b.yaml").write_text("")
    with pytest.raises(UserError, match=r"holds 2 YAML files \(a.yaml, b.yaml\), not one"):
        official.read(tmp_path)


@pytest.mark.slow
def test_pytorch_files_are_read_without_executing_anything(tmp_path):
    torch = pytest.importorskip("torch")
    official_folder = tmp_path / "official"
    official_folder.mkdir()
    params = random_params(EXPERT)
    description, state = official.export(EXPERT, params)
    official.write_configuration(official_folder, description)
    torch.save({name: torch.tensor(value) for name, value in state.items()}, official_folder / "pytorch_model.bin")
    _equal(official.read(official_folder)[1], params)

    class Runs:
        def __reduce__(self):
            return (print, ("executed",))

    torch.save({"x": Runs()}, official_folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="not a file of plain tensors"):
        official.read(official_folder)
