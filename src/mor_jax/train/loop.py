"""The training loop: one command from a configuration to a run folder, resumed by running it again.

Step n is dispatched before the metrics of step n - 1 are read, so the host never keeps the device waiting. Metrics are
written and checked before a checkpoint of the same step is started: no checkpoint holds a state that diverged, and no
line of metrics.jsonl is lost or repeated when a run is killed.
"""

import itertools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mor_jax.config import Config
from mor_jax.config import io as config_io
from mor_jax.data.pipeline import make_dataset as make_prepared_dataset
from mor_jax.evaluate.pictures import write_loss_picture, write_run_pictures
from mor_jax.evaluate.validation import validation_losses
from mor_jax.kernels.attention.backend import resolve_backend
from mor_jax.mesh.devices import Device
from mor_jax.mesh.mesh import check_mesh, make_mesh, shard_batch
from mor_jax.mesh.processes import barrier, is_primary, primary_first
from mor_jax.model.cut import cut_params
from mor_jax.model.parameters import Weights
from mor_jax.runs.checkpoint import Checkpoints
from mor_jax.runs.folder import RunLock, check_run_folder, claim_run_folder, writing_to
from mor_jax.runs.state import InitialWeights, TrainState
from mor_jax.runs.trackers import make_writers
from mor_jax.train.goodput import Ledger, Throughput
from mor_jax.train.objective import Batch, step_arrays
from mor_jax.train.phases import Phase, phases
from mor_jax.train.preemption import StopVote
from mor_jax.train.progress import Reporter, describe_rising_rate, roll_call
from mor_jax.train.run_start import MakeDataset, begin, load_initial, open_data, restore
from mor_jax.train.signals import StopRequest
from mor_jax.train.step import Metrics, compile_train_step
from mor_jax.train.watchdog import Watchdog

_log = logging.getLogger(__name__)
_GUARDED = ("loss", "grad_norm", "param_norm")

CompileStep = Callable[..., Callable[[TrainState, Batch], tuple[TrainState, Metrics]]]
"""Signature of ``train.step.compile_train_step``."""


class DivergedError(RuntimeError):
    """A loss, gradient or parameter became NaN or infinite."""


def train(
    config: Config,
    *,
    make_dataset: MakeDataset = make_prepared_dataset,
    devices: Sequence[Device] | None = None,
    initial_weights: Callable[[Config], InitialWeights | None] | None = None,
    compile_step: CompileStep | None = None,
) -> Path:
    """Train, or continue, the run that ``config`` describes.

    A folder that holds checkpoints of the same configuration is continued from the newest good one. Ctrl-C, SIGTERM,
    SIGUSR1 and SIGHUP save and return; with several processes, all save at the same step whichever was asked. Every
    process of a run calls this with the same configuration, after ``distributed.initialize``; the run folder must be
    one that all share.

    Args:
        config: of the run.
        make_dataset: opens a split of the data; a team's own may replace the default.
        devices: devices of the mesh; None takes all.
        initial_weights: loads the weights that the run starts from, or gives None; called only where it starts.
        compile_step: makes the program of a phase; None is ``compile_train_step``, and one's own is built from it.

    Returns:
        The run folder: config.json, metrics.jsonl, checkpoints/ and, after the last step, the pictures.

    Raises:
        UserError: configuration, data, checkpoint or folder cannot be used.
        DivergedError: NaN or infinity; the last good checkpoint stays.
    """
    ledger = Ledger()
    folder = check_run_folder(config)
    seconds = config.train.watchdog_seconds
    with writing_to(folder), RunLock(folder) as lock, StopRequest() as stop, Watchdog(seconds) as watchdog:
        with ledger.measure("init"):
            mesh = make_mesh(config.mesh, devices)
            run = _Run(config, folder, ledger, make_dataset, mesh, watchdog, lock, initial_weights)
        try:
            finished = run.train_steps(StopVote(stop, run.mesh), compile_step or compile_train_step)
            if finished and config.train.pictures:
                run.write_pictures()
            run.checkpoints.wait()
        finally:
            run.close()
        barrier("end of the run")
    return folder


class _Run:
    """Everything that one start of a run holds open."""

    def __init__(
        self,
        config: Config,
        folder: Path,
        ledger: Ledger,
        make_dataset: MakeDataset,
        mesh: Mesh,
        watchdog: Watchdog,
        lock: RunLock,
        initial_weights: Callable[[Config], InitialWeights | None] | None,
    ) -> None:
        self.config, self.folder, self.ledger, self.mesh, self.watchdog = config, folder, ledger, mesh, watchdog
        check_mesh(config, mesh)
        model = config.model
        self.attention = resolve_backend(config.perf.attention_backend, model.dtype, model.head_dim)
        with primary_first("open data"):  # the first to come prepares the embedded text
            self.dataset, self.held_out = open_data(config, make_dataset, mesh)
        tokenizer, starts_anew = self.dataset.tokenizer, not (folder / "checkpoints").is_dir()
        first = load_initial(config, initial_weights, tokenizer) if starts_anew else None
        watchdog.reached("restoring or initialising the state")
        lock.acquire()
        self.checkpoints = Checkpoints(
            folder / "checkpoints", keep=config.train.keep, pinned_steps=config.train.pinned_steps
        )
        restored = restore(config, mesh, self.checkpoints, self.dataset)
        if restored is None and not starts_anew:  # no checkpoint was completed
            first = load_initial(config, initial_weights, tokenizer)
        self.state, self.start = (begin(config, mesh, first), 0) if restored is None else restored
        primary, rising = is_primary(), None
        if primary:  # not before mesh, data and checkpoint have been found to fit
            if self.start:
                old = config_io.load(Config, folder / "config.json")
                rising = describe_rising_rate(old, config, self.start)
            claim_run_folder(config)
            if starts_anew or not (folder / "tokenizer.json").is_file():
                self.dataset.tokenizer.save(folder / "tokenizer.json")
        self.writers = make_writers(
            folder,
            restored_step=self.start,
            trackers=config.train.trackers,
            config=config_io.to_dict(config),
            primary=primary,
        )
        self.throughput = Throughput(config, ledger, list(self.mesh.devices.flat))
        self.reporter = Reporter(config.train.steps, self.start)
        self.logged = self.start
        self.reporter.say(f"run {folder}: {roll_call(self.state.params, self.mesh, self.attention)}")
        if self.start:
            self.reporter.say(f"continued from step {self.start}")
        if rising:
            self.reporter.say(rising)

    def train_steps(self, vote: StopVote, compile_step: CompileStep) -> bool:
        """Run the remaining steps; return whether the last one was reached."""
        pending: tuple[int, Metrics] | None = None
        remaining = [phase for phase in phases(self.config) if phase.end > self.start]
        if len(remaining) > 1:
            self.reporter.say(f"one program each: {'; '.join(phase.description for phase in remaining)}")
        batches: Iterator[Mapping[str, np.ndarray]] = iter(self.dataset)
        with self.ledger.measure("data_wait"):
            first = list(itertools.islice(batches, 1 if remaining else 0))  # says which arrays there are
        arrays = step_arrays(*first) if first else ()
        programs = [(phase, self._compile(phase, compile_step, arrays)) for phase in remaining]  # all that fails, now
        batches = itertools.chain(first, batches)
        batch_size = self.config.train.batch_size
        for done in range(self.start + 1, self.config.train.steps + 1):
            self.watchdog.reached(f"step {done}")
            if done > programs[0][0].end:
                programs.pop(0)
            with self.ledger.measure("data_wait"):
                rows = next(batches)
                batch = shard_batch(self.mesh, {name: rows[name] for name in arrays}, batch_size)
            with self.ledger.measure("step"):
                self.state, metrics = programs[0][1](self.state, batch)
            if pending is not None:
                self._read(*pending)
            pending = (done, metrics)
            with self.ledger.measure("step"):
                stop = vote.cast()
            if stop or self._is_due(done):
                self._read(*pending, now=True)
                pending = None
                if stop or self._saves(done):
                    self._save(done)
            if stop and done < self.config.train.steps:
                self.reporter.say(f"{stop}: saved at step {done}; the same command continues")
                return False
        return True

    def _compile(
        self, phase: Phase, compile_step: CompileStep, arrays: Sequence[str]
    ) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
        self.watchdog.reached(f"compiling the program of steps {phase.start + 1} to {phase.end}")
        with self.ledger.measure("compile"):
            executable = compile_step(phase.executed(self.config), self.mesh, phase.stage, arrays)
            barrier("compiled")  # a host that found it in its cache waits here, not in a collective
        return executable

    def _saves(self, done: int) -> bool:
        train = self.config.train
        every = train.save_every and done % train.save_every == 0
        return bool(every) or done in train.pinned_steps or done == train.steps

    def _evaluates(self, done: int) -> bool:
        train = self.config.train
        if self.held_out is None:
            return False
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
        if self.config.train.growth:
            values["num_recursions"] = self.config.stage_after(done).model.recursion.num_recursions
        values |= self.throughput.read(self.logged, done)
        self.logged = done
        if evaluates:
            self.watchdog.reached(f"the validation after step {done}")
            with self.ledger.measure("eval"):
                values |= validation_losses(
                    self._weights(done), self.config.perf, self.held_out, self.config.train.eval_rows
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

    def _save(self, done: int) -> None:
        self.watchdog.reached(f"the save of step {done}")
        self.writers.flush()  # no checkpoint is ahead of its metrics
        with self.ledger.measure("checkpoint"):
            self.checkpoints.save(self.state, data_step=self.dataset.step, data_hash=self.dataset.hash)

    def write_pictures(self) -> None:
        """Write loss.png, depth.png and routing.html."""
        self.watchdog.reached("the pictures")
        if self.held_out is None:
            write_loss_picture(self.folder, self.config)
            return
        with self.ledger.measure("eval"):
            write_run_pictures(self.folder, self.config, self._weights(self.config.train.steps), self.held_out)

    def _weights(self, done: int) -> Weights:
        """The model that the steps up to ``done`` have trained."""
        whole, trained, state = self.config.model, self.config.stage_after(done).model, self.state
        return Weights(trained, cut_params(whole, trained, state.params), state.router_bias_R, state.boundaries_R)

    def close(self) -> None:
        """Complete the last save and close what is open."""
        self.watchdog.reached("the last save")
        self.reporter.close()
        self.writers.close()
        self.dataset.close()
        if self.held_out is not None:
            self.held_out.close()
        with self.ledger.measure("checkpoint"):
            self.checkpoints.close()
        self.reporter.say(self.ledger.summary())


def _to_json(metrics: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return scalars as floats and vectors as lists."""
    return {name: value.tolist() for name, value in metrics.items()}
