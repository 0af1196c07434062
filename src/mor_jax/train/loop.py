"""The training loop: one command from a configuration to a run folder, resumed by running it again.

Step n is dispatched before the metrics of step n - 1 are read, so the host never keeps the device waiting. Metrics are
written and checked before a checkpoint of the same step is started: no checkpoint holds a state that diverged, and no
line of metrics.jsonl is lost or repeated when a run is killed.
"""

import dataclasses
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mor_jax.config import Config
from mor_jax.data.pipeline import make_dataset as make_prepared_dataset
from mor_jax.errors import UserError
from mor_jax.evaluate.pictures import write_run_pictures
from mor_jax.evaluate.validation import validation_losses
from mor_jax.model.attention import resolve_backend
from mor_jax.model.capacity import warmup_steps
from mor_jax.parallel import Device, check_mesh, make_mesh, shard_batch
from mor_jax.train.checkpoint import Checkpoints
from mor_jax.train.goodput import Ledger, Throughput, describe_peak
from mor_jax.train.metrics import make_writers
from mor_jax.train.progress import Reporter
from mor_jax.train.run_folder import check_run_folder, claim_run_folder, writing_to
from mor_jax.train.signals import StopRequest
from mor_jax.train.state import TrainState, abstract_train_state, init_train_state
from mor_jax.train.step import Batch, Metrics, compile_train_step

_log = logging.getLogger(__name__)
_GUARDED = ("loss", "grad_norm", "param_norm")

MakeDataset = Callable[..., Any]
"""Signature of ``data.pipeline.make_dataset``."""


class DivergedError(RuntimeError):
    """A loss, gradient or parameter became NaN or infinite."""


def enable_compilation_cache() -> Path:
    """Keep compiled programs between runs, in the folder named by MOR_CACHE or in ~/.cache/mor_jax."""
    folder = Path(os.environ.get("MOR_CACHE") or Path.home() / ".cache" / "mor_jax")
    jax.config.update("jax_compilation_cache_dir", str(folder))
    return folder


def train(
    config: Config,
    *,
    make_dataset: MakeDataset = make_prepared_dataset,
    devices: Sequence[Device] | None = None,
) -> Path:
    """Train, or continue, the run that ``config`` describes.

    A folder that holds checkpoints of the same configuration is continued from the newest good one. Ctrl-C and SIGTERM
    save and return.

    Args:
        config: of the run.
        make_dataset: opens a split of the data; a team's own may replace the default.
        devices: devices of the mesh; None takes all.

    Returns:
        The run folder: config.json, metrics.jsonl, checkpoints/ and, after the last step, the pictures.

    Raises:
        UserError: configuration, data, checkpoint or folder cannot be used.
        DivergedError: NaN or infinity; the last good checkpoint stays.
    """
    ledger = Ledger()
    folder = check_run_folder(config)
    with writing_to(folder), StopRequest() as stop:
        with ledger.measure("init"):
            run = _Run(config, folder, ledger, make_dataset, make_mesh(config.mesh, devices))
        try:
            finished = run.train_steps(stop)
            if finished:
                run.write_pictures()
            run.checkpoints.wait()
        finally:
            run.close()
    return folder


class _Run:
    """Everything that one start of a run holds open."""

    def __init__(self, config: Config, folder: Path, ledger: Ledger, make_dataset: MakeDataset, mesh: Mesh) -> None:
        self.config, self.folder, self.ledger, self.mesh = config, folder, ledger, mesh
        check_mesh(config, mesh)
        model = config.model
        self.attention = resolve_backend(config.perf.attention_backend, model.dtype, model.head_dim)
        self.dataset, self.held_out = _open_data(config, make_dataset)
        primary = jax.process_index() == 0
        if primary:  # not before configuration, mesh and data have been found usable
            claim_run_folder(config)
            self.dataset.tokenizer.save(folder / "tokenizer.json")
        self.checkpoints = Checkpoints(
            folder / "checkpoints", keep=config.train.keep, pinned_steps=config.train.pinned_steps
        )
        self._restore_or_init()
        self.writers = make_writers(
            folder, restored_step=self.start, tensorboard=config.train.tensorboard, primary=primary
        )
        self.throughput = Throughput(config, ledger, list(self.mesh.devices.flat))
        self.reporter = Reporter(config.train.steps, self.start)
        self.logged = self.start
        self._roll_call()

    def _restore_or_init(self) -> None:
        config = self.config
        restored = self.checkpoints.restore(abstract_train_state(config, self.mesh))
        if restored is None:
            self.state, self.start = init_train_state(config, self.mesh), 0
            return
        if restored.data_hash != self.dataset.hash:
            raise UserError(
                f"{self.folder} was trained on other data: data.source={config.data.source!r} had the hash "
                f"{restored.data_hash}, now {self.dataset.hash} (embedded text depends on the Python version)"
            )
        self.state, self.start = restored.state, int(restored.state.step)
        if self.start > config.train.steps:
            raise UserError(f"{self.folder} is at step {self.start}, beyond train.steps={config.train.steps}")
        self.dataset.step = restored.data_step

    def _roll_call(self) -> None:
        device = self.mesh.devices.flat[0]
        parameters = sum(math.prod(x.shape) for x in jax.tree.leaves(self.state.params))
        self.reporter.say(
            f"run {self.folder}: {parameters:,} parameters, "
            f"{self.mesh.size} x {device.device_kind} ({device.platform}), "
            f"mesh {dict(self.mesh.shape)}, attention {self.attention}, "
            f"peak {describe_peak(device)}, jax {jax.__version__}"
        )
        if self.start:
            self.reporter.say(f"continued from step {self.start}")

    def train_steps(self, stop: StopRequest) -> bool:
        """Run the remaining steps; return whether the last one was reached."""
        pending: tuple[int, Metrics] | None = None
        executable = None
        batches: Iterator[Mapping[str, np.ndarray]] = iter(self.dataset)
        for done in range(self.start + 1, self.config.train.steps + 1):
            if executable is None or done - 1 == warmup_steps(self.config.model):
                executable = self._compile(done - 1)
            with self.ledger.measure("data_wait"):
                batch = shard_batch(self.mesh, next(batches))
            with self.ledger.measure("step"):
                self.state, metrics = executable(self.state, batch)
            if pending is not None:
                self._read(*pending)
            pending = (done, metrics)
            if stop.requested or self._is_due(done):
                self._read(*pending, now=True)
                pending = None
                if stop.requested or self._saves(done):
                    self._save()
            if stop.requested and done < self.config.train.steps:
                self.reporter.say(f"{stop.requested}: saved at step {done}; the same command continues")
                return False
        return True

    def _compile(self, step: int) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
        """Compile the step for the phase that the 0-based ``step`` is in."""
        config, warmup = self.config, warmup_steps(self.config.model)
        if step < warmup and config.perf.execution != "scan":
            self.reporter.say(f"routing warms up until step {warmup}: perf.execution='scan', afterwards 'gather'")
            config = dataclasses.replace(config, perf=dataclasses.replace(config.perf, execution="scan"))
        with self.ledger.measure("compile"):
            return compile_train_step(config, self.mesh)

    def _saves(self, done: int) -> bool:
        train = self.config.train
        every = train.save_every and done % train.save_every == 0
        return bool(every) or done in train.pinned_steps or done == train.steps

    def _evaluates(self, done: int) -> bool:
        train = self.config.train
        return bool(train.eval_every and done % train.eval_every == 0) or done == train.steps

    def _is_due(self, done: int) -> bool:
        """Whether the metrics of this step are needed before the next one is dispatched."""
        return self._saves(done) or self._evaluates(done)

    def _read(self, done: int, metrics: Metrics, *, now: bool = False) -> None:
        """Wait for a step's metrics, check them, and write them if it is time."""
        with self.ledger.measure("step"):
            values = _to_json(jax.device_get(metrics))
        self._guard(done, values)
        self.reporter.step(done)
        evaluates = now and self._evaluates(done)
        if done % self.config.train.log_every and not evaluates:
            return
        values |= self.throughput.read(done - self.logged)
        self.logged = done
        if evaluates:
            with self.ledger.measure("eval"):
                values |= validation_losses(
                    self.config,
                    self.state.params,
                    self.state.router_bias_R,
                    self.held_out,
                    self.config.train.eval_rows,
                )
        self.writers.write(done, values)
        self.reporter.log(done, values)

    def _guard(self, done: int, values: Mapping[str, Any]) -> None:
        if all(math.isfinite(values[name]) for name in _GUARDED):
            return
        self.checkpoints.wait()
        saved = self.checkpoints.steps()
        kept = f"the last good checkpoint is step {saved[-1]}" if saved else "there is no checkpoint yet"
        facts = ", ".join(f"{name}={values[name]}" for name in (*_GUARDED, "learning_rate"))
        raise DivergedError(f"step {done} diverged: {facts}; {kept} in {self.checkpoints.folder}")

    def _save(self) -> None:
        with self.ledger.measure("checkpoint"):
            self.checkpoints.save(self.state, data_step=self.dataset.step, data_hash=self.dataset.hash)

    def write_pictures(self) -> None:
        """Write loss.png, depth.png and routing.html."""
        with self.ledger.measure("eval"):
            if jax.process_index() == 0:
                state = self.state
                write_run_pictures(self.folder, self.config, state.params, state.router_bias_R, self.held_out)

    def close(self) -> None:
        """Complete the last save and close what is open."""
        self.reporter.close()
        self.writers.close()
        for dataset in (self.dataset, self.held_out):
            dataset.close()
        with self.ledger.measure("checkpoint"):
            self.checkpoints.close()
        self.reporter.say(self.ledger.summary())


def _open_data(config: Config, make_dataset: MakeDataset) -> tuple[Any, Any]:
    """Open the training rows, which this process's share is read of, and the held-out rows."""
    shared = {"context_length": config.model.context_length, "vocab_size": config.model.vocab_size}
    share = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    rows = min(config.train.eval_rows, config.train.batch_size // config.train.accumulation)
    return (
        make_dataset(config.data, split="train", batch_size=config.train.batch_size, **share, **shared),
        make_dataset(config.data, split="validation", batch_size=rows, **shared),
    )


def _to_json(metrics: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return scalars as floats and vectors as lists."""
    return {name: value.tolist() for name, value in metrics.items()}
