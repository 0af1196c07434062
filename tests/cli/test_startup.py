"""What a command needs before it works: help, usage errors and counts come without JAX, runs without matplotlib."""

import json
import subprocess
import sys

HEAVY = ("jax", "flax", "optax", "orbax", "grain", "numpy", "tokenizers", "matplotlib", "tensorboardX")
TEXT = [
    ["--help"], ["trian"],
    ["train"], ["train", "--help"], ["train", "mor-360m-expert-r3", "--help"], ["train", "dbug"],
    ["train", "debug", "--train.stepz", "3"], ["train", "debug", "--train.steps", "many"],
    ["train", "debug", "--model.num-heads", "9"],
    ["presets", "--help"], ["presets"], ["presets", "360n"],
    ["prepare", "--help"], ["prepare", "a.txt", "--out", "x", "--packing", "tight"],
    ["plan", "--help"], ["plan", "debug", "--help"], ["plan", "debug", "--search", "--decode"],
    ["eval", "--help"], ["eval", "nowhere", "--stride", "4"],
    ["convert", "--help"], ["convert", "nowhere", "--to", "gguf"], ["convert", "nowhere"],
    ["sweep", "--help"], ["sweep", "absent.py"],
    ["generate", "--help"], ["generate", "nowhere", "--prompt", "a", "--file", "b"],
    ["serve", "--help"], ["serve", "nowhere", "--port", "-1"],
    ["bench", "--help"], ["bench", "train", "--help"], ["bench", "train", "nope"], ["bench", "train"],
    ["bench", "serve", "--help"], ["bench", "serve"],
    ["bench", "http", "--help"], ["bench", "http"], ["bench", "http", "http://a", "--requests", "0"],
    ["inspect", "--help"], ["inspect", "nowhere", "--text", "a", "--file", "b"],
]  # fmt: skip
"""Commands that only print."""
PRINTING = f"""
import contextlib, io, json, sys
from mor_jax.cli import COMMANDS, main
codes, culprits = set(), {{}}
for arguments in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            codes.add(main(arguments))
        except SystemExit as stop:
            codes.add(stop.code)
    for name in {HEAVY}:
        if name in sys.modules:
            culprits.setdefault(name, " ".join(arguments))
print(json.dumps([sorted(COMMANDS), sorted(codes), culprits]))
"""
WORKING = """
import sys
import mor_jax.evaluate.inspect, mor_jax.infer.language_model, mor_jax.serve.page, mor_jax.sweep.execute
import mor_jax.train.loop
print([name for name in ("matplotlib", "tensorboardX", "chex") if name in sys.modules])
"""


def _python(program: str, *arguments: str) -> str:
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def test_text_is_printed_without_jax(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    commands, codes, culprits = json.loads(_python(PRINTING, json.dumps(TEXT)))
    assert culprits == {}
    assert codes == [0, 2] and {arguments[0] for arguments in TEXT} >= set(commands)
    assert list(tmp_path.iterdir()) == []


def test_training_and_decoding_do_not_load_what_draws():
    assert _python(WORKING) == "[]\n"
