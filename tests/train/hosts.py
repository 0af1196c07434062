"""A tiny run as several processes on this host: run as a script it is one of them, imported it starts them."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

CACHE = Path(__file__).parent.parent.parent / ".jax_cache"


def free_port() -> int:
    """A port that nothing listens on just now."""
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]


class Hosts:
    """Processes of one run; what each prints goes to a file.

    Args:
        folder: for the runs, the batch records ``batches-<id>.txt`` and the outputs.
        count: processes that the run has.
        devices: fake devices of each.
        start: ids of the processes that are started; None starts all.
        options: ``train`` (fields), ``mesh`` (fields), ``pause`` (seconds per batch), ``timeout``, ``unreadable``
            (process, checkpoint).
    """

    def __init__(
        self, folder: Path, count: int, devices: int, start: tuple[int, ...] | None = None, **options: Any
    ) -> None:
        folder.mkdir(exist_ok=True)
        flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "MOR_CACHE": str(CACHE)}
        address = f"localhost:{free_port()}"
        self.folder = folder
        self.processes: dict[int, subprocess.Popen[bytes]] = {}
        for index in range(count) if start is None else start:
            place = {"coordinator": address, "count": count, "index": index}
            command = [sys.executable, __file__, json.dumps({"folder": str(folder), **place, **options})]
            with (folder / f"output-{index}.txt").open("wb") as output:
                self.processes[index] = subprocess.Popen(
                    command, env=environment, stdout=output, stderr=subprocess.STDOUT
                )

    def output(self, index: int) -> str:
        """What a process printed."""
        return (self.folder / f"output-{index}.txt").read_text()

    def wait_for_lines(self, lines: int, seconds: float = 600) -> None:
        """Wait until metrics.jsonl has so many lines."""
        path, deadline = self.folder / "tiny" / "metrics.jsonl", time.monotonic() + seconds
        while not path.exists() or path.read_text().count("\n") < lines:
            assert all(p.poll() is None for p in self.processes.values()), self.output(0)
            assert time.monotonic() < deadline, self.output(0)
            time.sleep(0.02)

    def wait(self, seconds: float = 600) -> list[int]:
        """Exit codes of all processes; those that do not end in time are killed."""
        deadline = time.monotonic() + seconds
        try:
            return [p.wait(max(deadline - time.monotonic(), 0.1)) for p in self.processes.values()]
        finally:
            for process in self.processes.values():
                process.kill()
                process.wait()

    def finish(self) -> Path:
        """Wait until all processes have ended well, and return the run folder."""
        codes = self.wait()
        assert not any(codes), (codes, *(self.output(i) for i in self.processes))
        return self.folder / "tiny"


def batch_rows(folder: Path) -> set[str]:
    """Lines "step row checksum" of all processes."""
    files = folder.glob("batches-*.txt")
    return {line for file in files for line in file.read_text().splitlines()}


def _lose_state_of(lost: int) -> None:
    """Make this process unable to read the arrays of a checkpoint, as a host with a bad mount is."""
    from mor_jax.runs.checkpoint import Checkpoints, DamagedCheckpointError

    read = Checkpoints._read

    def refuse(self: Any, step: int, item: str, args: Any) -> Any:
        result = read(self, step, item, args)  # with the others: Orbax waits for all processes
        if (step, item) == (lost, "state"):
            raise DamagedCheckpointError("state cannot be read here")
        return result

    Checkpoints._read = refuse


def _main(options: dict[str, Any]) -> None:
    from tiny_runs import dataset_maker, tiny_config

    from mor_jax.compilation_cache import enable_compilation_cache
    from mor_jax.config import DistributedConfig, MeshConfig
    from mor_jax.mesh.processes import initialize
    from mor_jax.train.loop import train

    folder = Path(options["folder"])
    config = tiny_config(folder, **options.get("train", {}))
    config = dataclasses.replace(config, mesh=MeshConfig(**options.get("mesh", {})))
    make = dataset_maker(config, folder / f"batches-{options['index']}.txt")

    def make_slow(*arguments: Any, **keywords: Any) -> Any:
        dataset = make(*arguments, **keywords)
        batch = dataset.batch
        dataset.batch = lambda step: (time.sleep(options.get("pause", 0)), batch(step))[1]
        return dataset

    place = {"coordinator": options["coordinator"], "process_id": options["index"], "num_processes": options["count"]}
    initialize(DistributedConfig(**place, timeout=options.get("timeout", 120)))
    enable_compilation_cache()
    if options["index"] == options.get("unreadable", [None])[0]:
        _lose_state_of(options["unreadable"][1])
    print(train(config, make_dataset=make_slow))


if __name__ == "__main__":
    from mor_jax.errors import UserError

    try:
        _main(json.loads(sys.argv[1]))
    except UserError as error:
        print(error)
        sys.exit(2)
