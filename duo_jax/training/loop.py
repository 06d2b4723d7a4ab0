"""The one training loop: one jitted step, on one CPU or many hosts, that goes on where a killed run stopped."""

from __future__ import annotations

import functools
import math
import signal
import time
from collections.abc import Sequence
from typing import Any

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
    """Keeps the metrics of steps on the device, and reads many steps in one copy, one step late."""

    def __init__(self, tokens_per_step: int) -> None:
        self._tokens_per_step = tokens_per_step
        self._pending: list[dict[str, jax.Array]] = []
        self.restart_clock()

    def restart_clock(self) -> None:
        """Counts the rate from here, after a pause that was not training."""
        self._since, self._steps = time.monotonic(), 0

    def add(self, metrics: dict[str, jax.Array]) -> None:
        """Adds a step's metrics and waits for the step before it: the device has one step queued, never none or many."""
        if self._pending:
            self._pending[-1]["loss"].block_until_ready()
        self._pending.append(metrics)
        self._steps += 1

    def read(self, step: int, *, late: bool = True) -> dict[str, float]:
        """Returns averages over the steps since the last reading, and the rate; empty where there is nothing to read.

        Args:
            step: the step taken last, for the error message.
            late: leave out the step that the device may still be busy with.

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
                f"the loss or its gradient is not finite near step {step}; nothing was saved after it went wrong. Go on "
                "from the last checkpoint with a lower config.train.lr or a longer config.train.warmup."
            )
        if self._steps:
            rate = self._steps / (time.monotonic() - self._since)
            mean |= {"steps_per_s": rate, "tokens_per_s": rate * self._tokens_per_step}
        self.restart_clock()
        return mean


def compile_step(config: ConfigDict, network: Network, mesh: Mesh) -> tuple[Any, Any, Any]:
    """Returns the jitted initialiser and train step, and the state's shapes with their shardings.

    The initialiser takes weights to start from, or None for fresh ones. The step takes `(state, batch)`, gives `(state,
    metrics)` and reuses the memory of the state it was given.
    """
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
        # Half-precision arrays are read as they were rounded: to sum what they were before, XLA would keep it in float32.
        compiler_options={"xla_allow_excess_precision": False},
    )
    return jax.jit(initial, out_shardings=shardings), step, shapes


def resume(config: ConfigDict, run: Run, checkpoints: Checkpoints, initial: Any, like: TrainState) -> TrainState:
    """Returns the state of the newest checkpoint, and moves the data there; or the initial state where there is none.

    Raises:
        UserError: the checkpoint is of another run, with the settings that differ; or the disk has no room for a first one.
    """
    latest = checkpoints.latest()
    if latest is None or latest < config.train.steps:
        checkpoints.check_space(like, 2 if latest is None else 1)
    if latest is None:
        return initial(run.start_from())
    record = checkpoints.record(latest)
    run.check_record(record, f"the checkpoint of step {latest} in {checkpoints.folder}")
    state, data = checkpoints.restore(latest, like)
    run.batches.set_state(data)
    run.say(f"Resuming from the checkpoint of step {latest:,} in {checkpoints.folder}.")
    if told := config_lib.told(record["config"], config):
        run.say(f"From here on {'; '.join(told)}.")
    return state


def train(config: ConfigDict, workdir: str, others: Sequence[Any] = ()) -> int | None:
    """Trains as `config` says, from the newest checkpoint in `workdir` if there is one, and leaves the results there.

    Ctrl-C or SIGTERM saves a checkpoint and returns; the same command then goes on.

    Args:
        config: the recipe.
        workdir: the run's folder.
        others: writers beside those of the run's own files; see `duo_jax.train`.

    Returns:
        the number of the signal that stopped the run, or None where it came to its end.

    Raises:
        UserError: what a user can put right, in one sentence.
    """
    config_lib.check(config)
    with Run.open(config, workdir, others) as run:
        initial, step_fn, like = compile_step(config, run.network, run.mesh)
        with Interrupt().watch() as interrupt:  # also while the last checkpoint is written
            checkpoints = Checkpoints(run.workdir, config.checkpoint.keep)
            try:
                state = resume(config, run, checkpoints, initial, like)
                run.start(int(state.step), state.params)
                state, stopped = take_steps(config, run, state, step_fn, checkpoints, interrupt)
            finally:
                checkpoints.close()
        step = int(state.step)
        if stopped or interrupt.alone():
            name = signal.Signals(interrupt.number).name
            run.say(f"Stopped by {name} at step {step:,} and saved. The same command goes on from there.")
            return interrupt.number
        run.finish(step, state.ema)
        return None


def take_steps(
    config: ConfigDict, run: Run, state: TrainState, step_fn: Any, checkpoints: Checkpoints, interrupt: Interrupt
) -> tuple[TrainState, bool]:
    """Takes the steps that are left, or those until the interrupt.

    Returns:
        the last state, which is saved, and whether it was the interrupt that ended the steps.
    """
    start, total = int(state.step), config.train.steps
    meter = Meter(config.train.batch_size * config.model.length)
    record = checkpoint_record(config, run.network)

    def due(every: int, step: int) -> bool:
        return every > 0 and step % every == 0 and step < total  # the last step's are done at the end

    def log(step: int, *, late: bool = True) -> None:
        if scalars := meter.read(step, late=late):
            run.write(step, {f"train/{name}": value for name, value in scalars.items()})
            rate = f", {scalars['tokens_per_s']:,.0f} tokens/s" if "tokens_per_s" in scalars else ""
            bar.set_postfix_str(f"loss {scalars['loss']:.3f}{rate}", refresh=False)

    def save(step: int) -> None:
        log(step, late=False)  # a loss that is not finite ends the run here, before it is saved
        checkpoints.save(state, run.batches.get_state(), record)
        meter.restart_clock()

    def report(step: int, *, again: bool = True) -> bool:
        """Evaluates and samples where that is due, also `again`; returns whether a signal came, which cuts it short."""
        evaluate = functools.partial(run.evaluate, between=interrupt.between)
        try:
            for every, act, done in (
                (config.eval.every, evaluate, run.evaluated),
                (config.sample.every, run.sample, run.sampled),
            ):
                if due(every, step) and not interrupt.alone() and (again or not done(step)):
                    act(step, state.ema)
                    meter.restart_clock()
        except Stopped:
            pass  # it is made up for when the run goes on
        return interrupt.alone()

    if start and report(start, again=False):  # the run was stopped between its checkpoint and what was due with it
        return state, True
    stopped = False
    with progress.bar(total=total, initial=start, desc="training", unit=" steps", disable=not run.primary) as bar:
        for step in range(start + 1, total + 1):
            batch = partition.put(next(run.batches), run.mesh)
            if step == start + 1:
                step_fn = step_fn.lower(state, batch).compile()  # once; a program for another shape cannot follow
                cli.release_memory()
                meter.restart_clock()
            with jax.transfer_guard("disallow"):
                state, metrics = step_fn(state, batch)
            meter.add(metrics)
            bar.update()
            stopped = interrupt.agreed(step, config.train.log_every)
            if stopped or step == total or due(config.checkpoint.every, step):
                save(step)
            elif step % config.train.log_every == 0:
                log(step)
            if not stopped and report(step):
                stopped = True
                save(step)
            if stopped:
                break
    return state, stopped
