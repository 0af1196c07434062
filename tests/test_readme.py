"""The README's library example runs as it stands, on the configuration of a tiny finished run."""

import dataclasses
import re
from pathlib import Path

import pytest

from mor_jax import presets
from mor_jax.config import io as config_io
from mor_jax.data.prepare import prepare

README = Path(__file__).parent.parent / "README.md"


def test_the_library_example_runs(tmp_path, monkeypatch, capsys):
    text = README.read_text(encoding="utf-8")
    example = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)[0]
    (tmp_path / "readme.txt").write_text(text, encoding="utf-8")
    source, out = str(tmp_path / "readme.txt"), tmp_path / "corpus"
    corpus = prepare([source], out, tokenizer="bpe:300", context_length=32, validation_share=0.0)
    config = presets.get("debug").config
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, num_layers=4, d_model=16, d_ff=32, vocab_size=300, context_length=32),
        data=dataclasses.replace(config.data, source=str(corpus)),
        train=dataclasses.replace(config.train, batch_size=8),
    )
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    config_io.save(config, tmp_path / "runs" / "demo" / "config.json")
    monkeypatch.chdir(tmp_path)
    exec(compile(example, str(README), "exec"), {"__name__": "example"})
    lines = capsys.readouterr().out.splitlines()
    losses = [float(line.split()[1]) for line in lines if re.fullmatch(r"\d+ \d+\.\d+", line)]
    assert len(losses) == 10 and losses[-1] < losses[0] == pytest.approx(5.7, abs=0.2)  # log(300) at the start
