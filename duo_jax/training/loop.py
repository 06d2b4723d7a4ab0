"""The training loop: one jitted step, on one CPU or many hosts; a killed run resumes where it stopped."""

from __future__ import annotations

import functools
import math
import signal
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from duo_jax import cli, objectives, progress
from duo_jax import config as config_lib
from duo_jax.errors import UserError
from duo_jax.models.network import Network
from duo_jax.training import optimizer as optimizer_lib
from duo_jax.training import partition
from duo_jax.training.checkpoint import Checkpoints
from duo_jax.training.checkpoint import record as checkpoint_record
from duo_jax.training.interrupt import Interrupt, Stopped
from duo_jax.training.run import Run
from duo_jax.training.state import TrainState, create, renew_teacher, train_step


class Meter:
    """Keeps the metrics of steps on the device and copies those of many steps at once, one step late."""

    def __init__(self, tokens_per_step: int) -> None:
        self._tokens_per_step = tokens_per_step
        self._pending: list[dict[str, jax.Array]] = []
        self.restart_clock()

    def restart_clock(self) -> None:
        """Starts to measure the rate anew, after a pause that was not training."""
        self._since, self._steps = time.monotonic(), 0

    def add(self, metrics: dict[str, jax.Array]) -> None:
        """Adds a step's metrics and waits for the step before it, so that the device always has one step queued."""
        if self._pending:
            self._pending[-1]["loss"].block_until_ready()
        self._pending.append(metrics)
        self._steps += 1

    def read(self, step: int, *, late: bool = True) -> dict[str, float]:
        """Returns averages over the steps since the last reading, and the rate; empty if there were none.

        Args:
            step: the last step taken, for the error message.
            late: leave out the last step, which the device may still be computing.

        Raises:
            UserError: the loss is not finite.
        """
        end = len(self._pending) - late
        rows, self._pending = jax.device_get(self._pending[:end]), self._pending[end:]
        if not rows:
            return {}
        mean = {name: sum(float(row[name]) for row in rows) / len(rows) for name in rows[0]}
        if not all(math.isfinite(value) for value in mean.values()):
            raise UserError(
                f"the loss or its gradient is not finite near step {step}; nothing was saved after that. Go on from the "
                "last checkpoint with a lower config.train.lr or a longer config.train.warmup."
            )
        if self._steps:
            rate = self._steps / (time.monotonic() - self._since)
            mean |= {"steps_per_s": rate, "tokens_per_s": rate * self._tokens_per_step}
        self.restart_clock()
        return mean


class Jitted(NamedTuple):
    """The jitted functions of a run.

    Attributes:
        initial: takes the weights to start from, or None for fresh ones, and returns the first state.
        step: takes `(state, batch)` and returns `(state, metrics)`; it reuses the memory of the state that it is given.
        shapes: a state of `jax.ShapeDtypeStruct`s with their shardings.
    """

    initial: Callable[..., TrainState]
    step: jax.stages.Wrapped
    shapes: TrainState


def compile_step(config: ConfigDict, network: Network, mesh: Mesh) -> Jitted:
    """Returns the jitted initialiser and train step of a config; they compile when they are first called."""
    optimizer = optimizer_lib.create(config.train)
    settings: dict[str, Any] = {
        "make_loss": objectives.training_loss(config, network, mesh=mesh),
        "optimizer": optimizer,
        "ema": config.train.ema,
        "accumulate": config.train.accumulate,
    }
    if network.algo == "dcd":
        distil = config.algo.distillation
        settings["new_teacher"] = functools.partial(renew_teacher, every=distil.round_length, source=distil.teacher)

    initial = functools.partial(create, network, optimizer, config.seed)
    shapes = jax.eval_shape(initial)
    shardings = partition.state_shardings(mesh, shapes)
    shapes = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
    step = jax.jit(
        functools.partial(train_step, **settings),
        in_shardings=(shardings, partition.batch_sharding(mesh)),
        out_shardings=(shardings, partition.replicated(mesh)),
        donate_argnums=0,
        # Otherwise XLA may keep the float32 values of half-precision arrays in memory, to sum them before rounding.
        compiler_options={"xla_allow_excess_precision": False},
    )
    return Jitted(jax.jit(initial, out_shardings=shardings), step, shapes)


def resume(config: ConfigDict, run: Run, checkpoints: Checkpoints, jitted: Jitted) -> TrainState:
    """Returns the state of the newest checkpoint and moves the data to its position; the initial state without one.

    Raises:
        UserError: the checkpoint is of another run (the message names the settings that differ), or the disk has no room
            for the next checkpoints.
    """
    latest = checkpoints.latest()
    if latest is None or latest < config.train.steps:
        checkpoints.check_space(jitted.shapes, 2 if latest is None else 1)
    if latest is None:
        return jitted.initial(run.start_from())
    record = checkpoints.record(latest)
    run.check_record(record, f"the checkpoint of step {latest} in {checkpoints.folder}")
    state, data = checkpoints.restore(latest, jitted.shapes)
    run.batches.set_state(data)
    run.say(f"Resuming from the checkpoint of step {latest:,} in {checkpoints.folder}.")
    for change in config_lib.announced(record["config"], config):
        run.say(f"{change} at this step.")
    return state


class _Steps:
    """The steps left in a run, and what happens between them: logging, saving, evaluating and sampling."""

    def __init__(
        self, config: ConfigDict, run: Run, state: TrainState, checkpoints: Checkpoints, interrupt: Interrupt
    ) -> None:
        self.state = state  # after the last step taken
        self._config, self._run, self._checkpoints, self._interrupt = config, run, checkpoints, interrupt
        self._record = checkpoint_record(config, run.network)
        self._meter = Meter(config.train.batch_size * config.model.length)

    def take(self, jitted: jax.stages.Wrapped) -> bool:
        """Takes the steps, saving the last, and returns whether a signal ended them early."""
        config, run, meter = self._config, self._run, self._meter
        start, total = int(self.state.step), config.train.steps
        # A run may have been stopped between a checkpoint and the evaluation that was due with it.
        if start and self._report(start, again=False):
            return True
        if start >= total:
            return False
        stopped = False
        with progress.bar(
            total=total, initial=start, desc="training", unit=" steps", disable=not run.primary
        ) as self._bar:
            for step in range(start + 1, total + 1):
                batch = partition.put(next(run.batches), run.mesh)
                if step == start + 1:
                    self._bar.set_description("compiling")
                    # Compiled here once; a batch of another shape then raises, rather than compile again.
                    step_fn = jitted.lower(self.state, batch).compile()
                    cli.release_memory()
                    self._bar.set_description("training")
                    self._bar.unpause()  # the rate counts from here
                    meter.restart_clock()
                with jax.transfer_guard("disallow"):
                    self.state, metrics = step_fn(self.state, batch)
                meter.add(metrics)
                self._bar.update()
                stopped = self._interrupt.agreed(step, config.train.log_every)
                if stopped or step == total or self._due(config.checkpoint.every, step):
                    self._save(step)
                elif step % config.train.log_every == 0:
                    self._log(step)
                if not stopped and self._report(step):
                    stopped = True
                    self._save(step)
                if stopped:
                    break
        return stopped

    def _due(self, every: int, step: int) -> bool:
        """Whether something is due at this step; `Run.finish` does what is due at the last one."""
        return every > 0 and step % every == 0 and step < self._config.train.steps

    def _log(self, step: int, *, late: bool = True) -> None:
        if scalars := self._meter.read(step, late=late):
            self._run.write(step, {f"train/{name}": value for name, value in scalars.items()})
            rate = f", {scalars['tokens_per_s']:,.0f} tokens/s" if "tokens_per_s" in scalars else ""
            self._bar.set_postfix_str(f"loss {scalars['loss']:.3f}{rate}", refresh=False)

    def _save(self, step: int) -> None:
        self._log(step, late=False)  # raises if the loss is not finite, before anything is saved
        self._checkpoints.save(self.state, self._run.batches.get_state(), self._record)
        self._meter.restart_clock()

    def _report(self, step: int, *, again: bool = True) -> bool:
        """Evaluates and samples if that is due; returns whether a signal came, which cuts this short.

        With `again=False` it leaves out what the run's files already hold for this step.
        """
        run, interrupt = self._run, self._interrupt
        evaluate = functools.partial(run.evaluate, between=interrupt.between)
        try:
            for every, act, done in (
                (self._config.eval.every, evaluate, run.evaluated),
                (self._config.sample.every, run.sample, run.sampled),
            ):
                if self._due(every, step) and not interrupt.alone() and (again or not done(step)):
                    act(step, self.state.ema)
                    self._meter.restart_clock()
        except Stopped:
            pass  # the evaluation is done when the run is resumed
        return interrupt.alone()


def train(config: ConfigDict, workdir: str, others: Sequence[Any] = ()) -> int | None:
    """Trains as `config` says, from the newest checkpoint in `workdir` if there is one, and writes the results there.

    Ctrl-C or SIGTERM saves a checkpoint and returns; the same command then goes on.

    Args:
        config: the recipe.
        workdir: the run's folder.
        others: writers besides those of the run's own files; see `duo_jax.train`.

    Returns:
        the number of the signal that stopped the run, or None if it finished.

    Raises:
        UserError: a mistake that the user can correct.
    """
    config_lib.check(config)
    with Run.open(config, workdir, others) as run:
        jitted = compile_step(config, run.network, run.mesh)
        with Interrupt().watch() as interrupt:  # also while the last checkpoint is written
            checkpoints = Checkpoints(run.workdir, config.checkpoint.keep)
            try:
                state = resume(config, run, checkpoints, jitted)
                run.start(int(state.step), state.params)
                steps = _Steps(config, run, state, checkpoints, interrupt)
                stopped = steps.take(jitted.step)
            finally:
                checkpoints.close()
        step = int(steps.state.step)
        if stopped or interrupt.alone():
            name = signal.Signals(interrupt.number).name
            run.say(f"Stopped by {name} at step {step:,} and saved. The same command goes on from there.")
            return interrupt.number
        run.finish(step, steps.state.ema)
        return None
