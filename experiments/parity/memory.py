"""Measure the host memory that reading and converting a sharded checkpoint takes (Linux only).

    python experiments/parity/memory.py

Writes a random bfloat16 Llama folder of several shards; then processes of their own convert it to this project's
weights, and those back to Llama, and report how far their resident memory (mapped pages included) rose above its
level before. Reading onto devices is not part of it: on a processor the model itself then lies in the same memory.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from mor_jax.config import ModelConfig
from mor_jax.interop import convert, llama
from mor_jax.interop.sources import open_model
from mor_jax.interop.tensor_files import write_shards

RESULT = Path(__file__).parent / "results" / "memory.json"
MODEL = ModelConfig(vocab_size=16384, num_layers=12, d_model=1024, num_heads=16, num_kv_heads=4, d_ff=2816)
TINY = dataclasses.replace(MODEL, vocab_size=64, num_layers=2, d_model=32, num_heads=2, num_kv_heads=1, d_ff=32)


def write_random(folder: Path, model: ModelConfig, shard_bytes: int) -> None:
    """Write a Llama folder of random numbers, tensor by tensor."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(llama.describe_config(model)), encoding="utf-8")
    shapes, generator = llama.written_shapes(model), np.random.default_rng(0)

    def arrays() -> Iterator[tuple[str, np.ndarray]]:
        for name, shape in shapes.items():
            yield name, generator.standard_normal(shape, np.float32)

    write_shards(folder, shapes, arrays(), dtype="bfloat16", shard_bytes=shard_bytes)


def status(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def child(source: Path, target: convert.Target, out: Path, warm: Path) -> None:
    """Convert once to import and compile everything, then measure a conversion; print the rise in bytes."""
    convert.write(open_model(warm, lazy=True), target, out.with_name(out.name + "-warm"))
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # resets the peak
    before = status("VmRSS")
    convert.write(open_model(source, lazy=True), target, out)
    print(status("VmHWM") - before)


def main() -> int:
    """Write, convert both ways, write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shard-mib", type=int, default=96)
    parser.add_argument("--child", nargs=4, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        source, target, out, warm = options.child
        child(Path(source), target, Path(out), Path(warm))
        return 0
    result = {}
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        write_random(root / "hf", MODEL, options.shard_mib << 20)
        write_random(root / "tiny", TINY, 1 << 20)
        sources = {"hf to mor": ("hf", "mor", "tiny", "ours"), "mor to hf": ("ours", "hf", "ours-warm", "again")}
        for name, (source, target, warm, out) in sources.items():
            paths = [str(root / source), target, str(root / out), str(root / warm)]
            command = [sys.executable, __file__, "--child", *paths]
            printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            rise = int(printed.splitlines()[-1])
            shards = [path.stat().st_size for path in (root / source).glob("*.safetensors")]
            written = [path.stat().st_size for path in (root / out).glob("*.safetensors")]
            result[name] = {
                "shards_read": len(shards),
                "largest_shard_read": max(shards),
                "bytes_read": sum(shards),
                "bytes_written": sum(written),
                "rise_of_resident_memory": rise,
                "rise_over_largest_shard_read": round(rise / max(shards), 2),
            }
    result |= {"jax": jax.__version__, "command": f"memory.py --shard-mib {options.shard_mib}"}
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
