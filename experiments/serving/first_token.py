"""What does `mor generate` read before its first token, and how long does that take?

Usage: python experiments/serving/first_token.py write mor-360m-expert-r3 RUN
       python experiments/serving/first_token.py write debug SMALL
       python experiments/serving/first_token.py measure RUN --floor SMALL --source NAME=SRC ... --out FILE

`write` saves a run of a preset at random weights, moments included. `measure` drops the run's files from the page
cache and counts what the process that generates one token has read: from storage (`read_bytes`: the run's files, as all
others are warm), and by all system calls (`rchar`, less what the same command reads for the small run: libraries). It
imports nothing of the package, so any commit's can be measured; several source trees (`src` folders) take turns.
"""

import argparse
import dataclasses
import json
import math
import os
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROUNDS, PROMPT = 3, "Once"


def write(preset: str, run: Path) -> None:
    """Save the run of a preset before its first step, its moments as wide open as trained ones."""
    import jax
    import jax.numpy as jnp

    from mor_jax import presets
    from mor_jax.config import io as config_io
    from mor_jax.data.tokenizer import Tokenizer
    from mor_jax.mesh.mesh import make_mesh
    from mor_jax.runs.checkpoint import Checkpoints
    from mor_jax.runs.state import init_train_state

    config = presets.get(preset).config
    state = init_train_state(config, make_mesh(config.mesh, jax.devices()[:1]))
    key = jax.random.key(1)
    noise = jax.tree.map(lambda x: 1e-3 * jax.random.normal(key, x.shape, x.dtype) if x.ndim else x, state.opt_state)
    run.mkdir(parents=True)
    config_io.save(config, run / "config.json")
    Tokenizer.bytes_level().save(run / "tokenizer.json")
    checkpoints = Checkpoints(run / "checkpoints", keep=1)
    checkpoints.save(dataclasses.replace(state, step=jnp.int32(1), opt_state=noise), data_step=1, data_hash="none")
    checkpoints.close()


def weights_bytes(run: Path) -> int:
    """Bytes of the parameters of a run's checkpoint."""
    (about,) = run.glob("checkpoints/*/about/metadata")
    leaves = json.loads(about.read_text())["leaves"]
    sizes = {"float32": 4}
    params = (leaf for name, leaf in leaves.items() if name.startswith("params/"))
    return sum(math.prod(leaf["shape"]) * sizes[leaf["dtype"]] for leaf in params)


def forget(run: Path) -> None:
    """Drop a run's files from the page cache."""
    for path in run.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def generate(run: Path, source: Path) -> dict[str, float]:
    """Generate one token, and say what the process had read and held when the token was there."""
    forget(run)
    command = [sys.executable, "-m", "mor_jax.cli", "generate", str(run), "--prompt", PROMPT, "--max-tokens", "1"]
    environment = {**os.environ, "PYTHONPATH": str(source)}
    begun = time.perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
    ) as child:
        assert child.stderr is not None
        said = []
        for line in child.stderr:
            said.append(line)
            if line.startswith("1 tokens:"):  # the summary, which follows the token
                seconds = time.perf_counter() - begun
                counts = _numbers(f"/proc/{child.pid}/io")
                memory = _numbers(f"/proc/{child.pid}/status")
                return {
                    "seconds": seconds,
                    "rchar": counts["rchar"],
                    "read_bytes": counts["read_bytes"],
                    "peak_memory_bytes": 1024 * memory["VmHWM"],
                }
    raise SystemExit("no token:\n" + "".join(said))


def _numbers(path: str) -> dict[str, int]:
    fields = (line.split() for line in Path(path).read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) for words in fields if len(words) > 1 and words[1].isdecimal()}


def measure(run: Path, small: Path, sources: dict[str, Path]) -> dict[str, Any]:
    """Take the medians of some rounds of every source tree in turn; one before them warms libraries and programs up."""
    weights, found = weights_bytes(run), {name: [] for name in sources}
    floors = {}
    for name, source in sources.items():
        floors[name] = [generate(small, source) for _ in range(2)][-1]["rchar"] - weights_bytes(small)
        generate(run, source)
    for _ in range(ROUNDS):
        for name, source in sources.items():
            found[name].append(generate(run, source))
    return {
        "preset": json.loads((run / "config.json").read_text())["preset"],
        "weights_bytes": weights,
        "checkpoint_bytes": sum(p.stat().st_size for p in run.rglob("*") if p.is_file()),
        "results": {name: _summary(rounds, floors[name], weights) for name, rounds in found.items()},
    }


def _summary(rounds: list[dict[str, float]], floor: float, weights: int) -> dict[str, Any]:
    medians = {name: statistics.median(found[name] for found in rounds) for name in rounds[0]}
    medians["rchar_of_the_run"] = medians.pop("rchar") - floor
    ratios = {f"{name}_over_weights": medians[name] / weights for name in ("read_bytes", "rchar_of_the_run")}
    return {**medians, **ratios, "rounds": rounds}


def main() -> None:
    """Write a run, or measure one and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    writer = commands.add_parser("write")
    writer.add_argument("preset")
    writer.add_argument("run", type=Path)
    measurer = commands.add_parser("measure")
    measurer.add_argument("run", type=Path)
    measurer.add_argument("--floor", type=Path, required=True, help="a small run")
    measurer.add_argument("--source", action="append", required=True, help="NAME=SRC, a source tree to measure")
    measurer.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.command == "write":
        write(arguments.preset, arguments.run)
        return
    about = {
        "command": "python experiments/serving/first_token.py measure RUN --floor SMALL --source ...",
        "platform": os.environ.get("JAX_PLATFORMS", ""),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "versions": {name: version(name) for name in ("jax", "jaxlib", "orbax-checkpoint", "tensorstore")},
    }
    sources = {name: Path(path) for name, path in (text.split("=", 1) for text in arguments.source)}
    found = measure(arguments.run, arguments.floor, sources)
    arguments.out.write_text(json.dumps({**about, **found}, indent=2) + "\n")


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")


if __name__ == "__main__":
    main()
