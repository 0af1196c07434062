"""What the scripts of this folder that train have in common: options, held-out texts, going on elsewhere."""

import functools
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # driver.py
from driver import DriverOptions, take_over

from mor_jax.data.manifest import read_manifest
from mor_jax.errors import require
from mor_jax.evaluate.text_loss import text_losses
from mor_jax.interop.sources import open_run


@dataclass(frozen=True)
class LaunchOptions(DriverOptions):
    """Options of the scripts."""

    scale: str = "full"
    """`full` or `debug`."""
    corpus: str = "data/isoflop"
    """Prepared corpus, whose held-out split is the half `choose`."""
    report: Path | None = None
    """The other half, on which figures are reported."""
    val: Path | None = None
    """Another held-out text, reported beside."""
    earlier: Path | None = None
    """Results of another machine: what is done there is taken over."""

    @property
    def texts(self) -> dict[str, Path]:
        """Texts that every finished run is measured on, by name."""
        return {name: path for name in ("report", "val") if (path := getattr(self, name)) is not None}

    @property
    def plan_path(self) -> Path:
        """Where workers read until when they may start."""
        return self.out / "plan.json"


def prepare(options: LaunchOptions) -> None:
    """Check the texts, and put the results of another machine where this one would have left them."""
    for path in options.texts.values():
        require(path.is_file(), f"{path}: no such file")
    options.out.mkdir(parents=True, exist_ok=True)
    if options.earlier is not None:
        values = json.loads(options.earlier.read_text(encoding="utf-8"))
        require(values["scale"] == options.scale, f"{options.earlier} is of scale {values['scale']!r}")
        mine = corpus_hash(options)
        theirs = values.get("corpus")
        require(
            theirs == mine, f"{options.earlier} is of the corpus {theirs}, but {options.corpus} has the hash {mine}"
        )
        take_over(options.out, values["results"])


def corpus_hash(options: LaunchOptions) -> str | None:
    """Return the content hash of the prepared corpus; None at scale `debug`, which prepares its own."""
    return None if options.scale == "debug" else read_manifest(Path(options.corpus)).hash


def worker_command(options: LaunchOptions, script: str) -> list[str]:
    """Return what starts a worker, less its number."""
    command = [script, "--scale", options.scale, "--corpus", options.corpus, "--out", str(options.out)]
    command += ["--devices", str(options.devices)]
    for name, path in options.texts.items():
        command += [f"--{name}", str(path)]
    return command


def described(options: LaunchOptions, script: str) -> str:
    """Return the command without the folders of this machine."""
    return (
        f"python experiments/isoflop/{script} --scale {options.scale} --seconds {options.seconds:g} "
        f"--devices {options.devices} --processes {options.processes}"
    )


def measurer(
    options: LaunchOptions, wanted: Callable[[str, str], bool] = lambda text, run: True
) -> Callable[[Path], dict[str, Any]] | None:
    """Return what measures a finished run on the texts that are wanted of it (by their names); None without texts."""
    return functools.partial(_measure, options.texts, wanted) if options.texts else None


def _measure(texts: dict[str, Path], wanted: Callable[[str, str], bool], folder: Path) -> dict[str, Any]:
    """Causal and look-ahead loss by source of texts that the run did not validate on."""
    run = open_run(folder)
    stride = run.config.model.context_length
    return {name: text_losses(run, [path], stride=stride) for name, path in texts.items() if wanted(name, folder.name)}
