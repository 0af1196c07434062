"""Run the notebooks and write them as pages of docs/notebooks: Markdown with their output, figures beside it.

python notebooks/render.py                     # all of them
python notebooks/render.py quickstart --out pages
"""

import argparse
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbconvert import MarkdownExporter

HERE = Path(__file__).parent
PAGES = HERE.parent / "docs" / "notebooks"
NOTE = "<!-- Written by `make notebooks` from notebooks/{name}.ipynb; do not edit. -->\n\n"
_SECONDS_PER_CELL = 300
_TERMINAL = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_TEMPORARY = re.compile(re.escape(tempfile.gettempdir()) + r"/tmp\w+")


def names() -> list[str]:
    """Return the names of the notebooks."""
    return sorted(path.stem for path in HERE.glob("*.ipynb"))


def execute(name: str) -> nbformat.NotebookNode:
    """Run a notebook from its first cell, in its folder.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    notebook = nbformat.read(HERE / f"{name}.ipynb", as_version=4)
    client = NotebookClient(
        notebook, timeout=_SECONDS_PER_CELL, kernel_name="python3", resources={"metadata": {"path": str(HERE)}}
    )
    return client.execute()


def plain_outputs(outputs: Sequence[Any]) -> list[Any]:
    """Return outputs as a page shows them: printed lines joined and without colours, no log, no temporary folders."""
    kept: list[Any] = []
    for output in outputs:
        data = output.get("data", {})
        if output.get("name") == "stderr":
            continue
        if data.get("text/html", "").startswith("<pre") and "text/plain" in data:  # a line of the progress display
            output = nbformat.v4.new_output("stream", name="stdout", text=data["text/plain"])
        if output.output_type == "stream":
            output.text = _TEMPORARY.sub("RUNS", _TERMINAL.sub("", output.text))
            if kept and kept[-1].output_type == "stream":
                kept[-1].text += output.text
                continue
        kept.append(output)
    return kept


def write_page(name: str, notebook: nbformat.NotebookNode, out: Path) -> list[Path]:
    """Write an executed notebook as NAME.md and its figures as NAME_N.png."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = plain_outputs(cell.outputs)
    exporter = MarkdownExporter()
    text, resources = exporter.from_notebook_node(notebook)
    written = []
    out.mkdir(parents=True, exist_ok=True)
    for index, (key, data) in enumerate(sorted(resources["outputs"].items())):
        figure = out / f"{name}_{index}.png"
        figure.write_bytes(data)
        text = text.replace(f"]({key})", f"]({figure.name})")
        written.append(figure)
    page = out / f"{name}.md"
    page.write_text(NOTE.format(name=name) + text.strip() + "\n", encoding="utf-8")
    return [page, *written]


def main() -> int:
    """Run what was asked for; the first cell that fails ends it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=names(), help="notebooks; none is all")
    parser.add_argument("--out", type=Path, default=PAGES, help="folder of the pages")
    options = parser.parse_args()
    for name in options.names:
        started = time.monotonic()
        for path in write_page(name, execute(name), options.out):
            print(path)
        print(f"{name}: {time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
