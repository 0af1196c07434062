"""Notebooks hold no output, their pages hold their code, and each runs from its first cell to its last."""

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDER, PAGES = ROOT / "notebooks", ROOT / "docs" / "notebooks"
NOTEBOOKS = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
MOST_SECONDS = 900
"""The longest takes up to three minutes on two idle cores."""


def _code(name):
    cells = json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def test_there_are_notebooks():
    assert {"quickstart", "ablation", "uptraining"} <= set(NOTEBOOKS)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_stored_without_output(name):
    for cell in _code(name):
        assert cell["outputs"] == [] and cell["execution_count"] is None and cell["metadata"] == {}
        ast.parse("".join(cell["source"]))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_page_shows_its_notebook(name):
    page = (PAGES / f"{name}.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)\n```", page, re.DOTALL)
    assert blocks == ["".join(cell["source"]) for cell in _code(name)], (
        f"`make notebooks` writes docs/notebooks/{name}.md"
    )
    figures = re.findall(r"!\[png\]\((.+?)\)", page)
    assert figures and all((PAGES / figure).is_file() for figure in figures)
    assert "Traceback" not in page and not re.search(r"(?<![\w.])/(tmp|home|work|root)/", page)


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs(name, tmp_path):
    for package in ("nbclient", "nbconvert", "ipykernel"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package} (the extra `notebooks`)")
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    command = [sys.executable, str(FOLDER / "render.py"), name, "--out", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=MOST_SECONDS, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert (tmp_path / f"{name}.md").stat().st_size > 2000
    assert (tmp_path / f"{name}_0.png").stat().st_size > 2000
