"""The training loop: resume, iterate, log, evaluate, checkpoint, stop.

The guarantee: with the same jax, flags and device, a run that was killed at any moment and started again ends with the
same parameters and the same `metrics.jsonl` (timings aside), bit for bit, as one that ran through. It holds because an
iteration is a pure function of the state, whose randomness is folded from `(state.seed, state.step)`, and a host batch
one of (seed, step), of the weights that were published, and of host state that is saved with each checkpoint. RESUME.md
says what that takes and where it ends.
"""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections import deque
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxrl_llm.train.checkpoints import Checkpoints, finished_steps
from jaxrl_llm.train.host_state import HostState, load_host_state, save_host_state, set_damaged_aside
from jaxrl_llm.train.interrupts import Interrupted, StopRequests
from jaxrl_llm.train.logging import RunLog
from jaxrl_llm.train.sharding import shard_batch
from jaxrl_llm.train.watchdog import Watchdog
from jaxrl_llm.types import Metrics, TrainState

Partial = jax.tree_util.Partial


class NonFiniteError(FloatingPointError):
    """Too many updates in a row were not finite. The state before the first of them is in the checkpoint."""


def over_seeds(
    function: Callable, seed: int | tuple[int, ...], *, num_shared: int = 0, donate: bool = False
) -> Callable:
    """`jit` of a function; with a tuple of seeds, of the function mapped over the leading axis of its arguments.

    A function that is a `jax.tree_util.Partial` has its bound arrays passed as arguments, shared by all seeds. Arrays
    that a plain function closes over are compiled in as constants: slow for large ones.

    Args:
      seed: `config.seed`; an int maps nothing.
      num_shared: how many of the last arguments have no seeds' axis.
      donate: give up the buffers of the first argument.
    """
    bound = function if isinstance(function, Partial) else Partial(function)

    def call(bound: Callable, *arguments: PyTree) -> PyTree:
        if not isinstance(seed, tuple):
            return bound(*arguments)
        axes = [0] * (len(arguments) - num_shared) + [None] * num_shared
        return jax.vmap(bound, in_axes=axes)(*arguments)

    jitted = jax.jit(call, donate_argnums=1 if donate else ())

    def mapped(*arguments: PyTree) -> PyTree:
        return jitted(bound, *arguments)

    mapped.jitted = jitted  # type: ignore[attr-defined]  # to count compilations
    return mapped


def stack_seeds(seed: int | tuple[int, ...], function: Callable[[int], PyTree]) -> PyTree:
    """`function(seed)` on the host; for a tuple of seeds, the results stacked along a new first axis.

    For host batches: `batch=lambda step: stack_seeds(config.seed, lambda seed: make_batch(seed, step))`.
    """
    if not isinstance(seed, tuple):
        return function(seed)
    return jax.tree.map(lambda *leaves: np.stack(leaves), *[function(one) for one in seed])


def loop(
    init: Callable[..., TrainState],
    iteration: Callable[..., tuple[TrainState, Metrics]],
    *,
    steps: int,
    log: RunLog,
    stage: str = "train",
    batch: Callable[[int], PyTree] | None = None,
    own_rows: bool = False,
    previous: PyTree | None = None,
    evaluate: Callable[[TrainState], Metrics] | None = None,
    evaluate_every: int | None = None,
    publish: Callable[[int, TrainState], None] | None = None,
    host: HostState | None = None,
) -> TrainState:
    """Trains one stage to its end, going on from the newest good checkpoint in the workdir.

    Metrics are logged after every step, and checkpoints written every `checkpoint_every` steps and at the end.
    Evaluation takes place before the first step, every `evaluate_every` steps and after the last; its metrics stand in
    the line of that step, with `eval/` before their names. The loop adds `seconds` (of the iteration alone, the first
    with its compilation), and `tokens_per_second` where there is a metric `tokens`.

    Read from `log.config`: `seed` (default 0), `checkpoint_every` (50), `keep_checkpoints` (2), `max_skipped_in_row`
    (10), `step_timeout` (seconds after which a step that hangs ends the process: see `Watchdog`), `grace_seconds` (that
    a step has to end and be saved after a signal: see `StopRequests`). If `config.seed` is a tuple, everything is
    mapped over seeds: each array of the state has an axis of seeds in front, and each seed has its own line in
    `metrics.jsonl`.

    Args:
      init: `init(seed) -> state`, or `init(seed, previous)` where `previous` is given. Parameters that all seeds start
        from are bound to it: `jax.tree_util.Partial(init, params)`, as `over_seeds` says.
      iteration: `iteration(state) -> (state, metrics)`, or `iteration(state, batch)`; pure. The loop sets `state.step`.
        Metrics are a flat dict of scalars. Like `evaluate`, it may be a `jax.tree_util.Partial`: see `over_seeds`.
      steps: iterations of this stage.
      batch: `batch(step)`, numpy arrays for the iteration after `step` finished ones, a pure function of (seed, step).
        With several seeds its arrays have the seeds' axis in front: see `stack_seeds`.
      own_rows: with several processes, `batch` gives each its own part of the rows: see `shard_batch`.
      previous: what `init` starts from, such as the state that an earlier stage returned; with the seeds' axis if there
        is one.
      evaluate: `evaluate(state) -> metrics`; pure.
      publish: `publish(step, state)`, called with the state that the stage begins or goes on with and after every
        iteration, before the next batch is asked for. The next iteration takes the buffers of the state over.
      host: what `batch` keeps on the host from step to step, saved and restored with each checkpoint. `batch` alone may
        change it: it is called once for each step, after the checkpoint of the steps before, and `publish` is called
        again when a run goes on.

    Returns:
      The state after `steps` iterations.

    Raises:
      ValueError: `steps`, `evaluate_every` or a setting out of range; an iteration that changes a shape or type of its
        state.
      NonFiniteError: `max_skipped_in_row` updates in a row were skipped.
      Interrupted: SIGINT or SIGTERM came; the step was finished and saved.
      CheckpointError: no checkpoint of those there are can be used.
      DiskFullError: there was no room for the record.
    """
    config = log.config
    seed = config.get("seed", 0)
    seed = tuple(seed) if isinstance(seed, list) else seed
    checkpoint_every = _positive("config.checkpoint_every", config.get("checkpoint_every", 50))
    max_skipped = _positive("config.max_skipped_in_row", config.get("max_skipped_in_row", 10))
    if evaluate_every is not None:
        _positive("evaluate_every", evaluate_every)
    if steps < 0:
        raise ValueError(f"steps of stage {stage!r} must not be negative, got {steps}")

    run_init = over_seeds(init, seed)
    run_iteration = over_seeds(_counted(iteration), seed, donate=True)
    run_evaluate = over_seeds(evaluate, seed) if evaluate else None

    seeds = jnp.asarray(seed, jnp.int32)
    state = run_init(seeds) if previous is None else run_init(seeds, previous)
    # Fresh buffers: a donated state must share none with `previous`, nor two of its own leaves one.
    state = jax.tree.map(lambda leaf: jnp.array(leaf, dtype=leaf.dtype, copy=True), state)
    checkpoints = Checkpoints(log.workdir / "checkpoints" / stage, keep=config.get("keep_checkpoints", 2))
    step = 0
    if host is not None:
        set_damaged_aside(checkpoints.folder)
    if restored := checkpoints.restore(state):
        step, state = restored
        if host is not None:
            host.set_state(load_host_state(checkpoints.folder, step))
        log.info(
            f"{stage}: going on from step {step} of {steps}" if step < steps else f"{stage}: complete at step {step}"
        )
    if step > steps:
        raise ValueError(
            f"stage {stage!r} has a checkpoint at step {step}, beyond its {steps} steps; use another workdir"
        )
    in_row = int(np.max(getattr(state, "skipped_in_row", 0)))
    if in_row >= max_skipped:
        raise _too_many_skipped(stage, step, in_row, "found when the run was taken up again", checkpoints)
    log.start_stage(stage, step if restored else -1, steps)
    recorder = _Recorder(log, stage, seed, jax.tree_util.tree_leaves_with_path(getattr(state, "params", ())), state)

    def evaluation_due(step: int) -> bool:
        return run_evaluate is not None and (step in (0, steps) or bool(evaluate_every and step % evaluate_every == 0))

    def next_batch(step: int) -> tuple:
        if batch is None:
            return ()
        return (batch(step) if isinstance(seed, tuple) else shard_batch(batch(step), own_rows=own_rows),)

    def save(step: int, state: TrainState) -> None:
        log.sync()
        if host is not None:
            save_host_state(checkpoints.folder, step, host)
        checkpoints.save(step, state)

    def newest() -> str:
        steps_saved = finished_steps(checkpoints.folder)
        return f"step {steps_saved[-1]}" if steps_saved else f"none yet of stage {stage}"

    pending: deque[tuple[int, Metrics, Metrics]] = deque()
    watchdog = Watchdog(log.workdir, config.get("step_timeout"))
    try:
        with watchdog, StopRequests(config.get("grace_seconds"), newest) as stop:
            watchdog.expect("start", f"{stage}: what comes before step {step + 1}")
            if not restored:
                if run_evaluate is not None:
                    recorder.write(0, {}, run_evaluate(state))
                if steps == 0:
                    save(0, state)
            if publish is not None:
                publish(step, state)
            signal = 0
            if step < steps:
                upcoming = next_batch(step)
                _check_iteration(run_iteration, state, upcoming)
            while step < steps:
                # Times are compared among steps alike. An evaluation may still be under way in the step behind it.
                kind = evaluation_due(step), evaluation_due(step + 1), (step + 1) % checkpoint_every == 0
                watchdog.expect(kind, f"{stage}: step {step + 1}, with what was under way of step {step},")
                state, metrics = run_iteration(state, *upcoming)
                step += 1
                if publish is not None:
                    publish(step, state)
                pending.append((step, metrics, run_evaluate(state) if run_evaluate and evaluation_due(step) else {}))
                signal = stop.agreed()
                save_now = step % checkpoint_every == 0 or step == steps or signal != 0
                # One step stays in flight, so that the device never waits for the host to log. Before a checkpoint
                # all lines are written: the record is never behind the state that a resumed run starts from. Nor is
                # anything left in flight while updates fail, so that the run ends at the step that is one too many.
                while len(pending) > (0 if save_now or recorder.skipped_in_row or max_skipped == 1 else 1):
                    recorder.write(*pending.popleft())
                failed = recorder.skipped_in_row >= max_skipped
                if save_now or failed:
                    save(step, state)
                    recorder.restart_clock()
                if failed:
                    checkpoints.wait()
                    raise _too_many_skipped(stage, step, recorder.skipped_in_row, recorder.bad, checkpoints)
                if signal:
                    break
                if step < steps:
                    upcoming = next_batch(step)
            watchdog.expect("end", f"{stage}: the write of its last checkpoint")
            checkpoints.wait()
            signal = signal or stop.agreed()
            if signal:
                log.end_stage()
                log.info(f"{stage}: stopped after step {step} of {steps}, saved; the same command goes on from there")
                raise Interrupted(128 + signal)
    finally:
        try:
            log.end_stage()
        finally:
            checkpoints.close()
    return state


def _too_many_skipped(stage: str, step: int, in_row: int, bad: str, checkpoints: Checkpoints) -> NonFiniteError:
    return NonFiniteError(
        f"{stage}: {in_row} updates in a row were not finite, the last at step {step} ({bad}). The parameters from "
        f"before them are saved in {checkpoints.folder / str(step)}. Lower the learning rate, or raise "
        "config.max_skipped_in_row, in a new workdir"
    )


def _positive(name: str, value: int) -> int:
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return value


def _counted(iteration: Callable) -> Callable:
    """The iteration with the step counted and the skip counts among its metrics, whatever the page makes of either."""
    bound = iteration if isinstance(iteration, Partial) else Partial(iteration)
    return Partial(_iterate_and_count, bound)


def _iterate_and_count(iteration: Callable, state: TrainState, *batch: PyTree) -> tuple[TrainState, Metrics]:
    new_state, metrics = iteration(state, *batch)
    new_state = dataclasses.replace(new_state, step=state.step + 1)
    counts = {name: getattr(new_state, name) for name in ("skipped", "skipped_in_row") if hasattr(new_state, name)}
    return new_state, {**metrics, **counts}


def _check_iteration(run_iteration: Callable, state: TrainState, batch: tuple) -> None:
    """The state that goes in and the one that comes out must be alike, else a checkpoint would not fit at resume."""
    after, _ = jax.eval_shape(run_iteration, state, *batch)
    path_of = jax.tree_util.keystr
    before = {path_of(path): (leaf.shape, leaf.dtype) for path, leaf in jax.tree_util.tree_leaves_with_path(state)}
    after = {path_of(path): (leaf.shape, leaf.dtype) for path, leaf in jax.tree_util.tree_leaves_with_path(after)}
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) != after.get(name):
            there = [f"{leaf[1]}{list(leaf[0])}" if leaf else "absent" for leaf in (before.get(name), after.get(name))]
            raise ValueError(
                f"an iteration must keep its state's shapes and types; state{name} goes in as {there[0]}, "
                f"comes out as {there[1]}"
            )


class _Recorder:
    """Fetches metrics from the device, writes their lines, and watches for skipped updates."""

    def __init__(self, log: RunLog, stage: str, seed: Any, leaves: list, state: Any) -> None:
        self.log, self.stage, self.seed = log, stage, seed
        self.leaf_names = ["params" + jax.tree_util.keystr(path) for path, _ in leaves]
        self.skipped = np.asarray(getattr(state, "skipped", 0))
        self.skipped_in_row = 0
        self.bad = ""
        self.restart_clock()

    def restart_clock(self) -> None:
        self.clock = time.perf_counter()

    def write(self, step: int, metrics: Metrics, evaluation: Metrics) -> None:
        metrics = jax.device_get(metrics)
        seconds = time.perf_counter() - self.clock
        evaluation = {f"eval/{name}": value for name, value in jax.device_get(evaluation).items()}
        self.restart_clock()
        if not isinstance(self.seed, tuple):
            line = self._line(metrics, seconds) | evaluation
            self.log.metrics(self.stage, step, line)
            self.log.progress(step, line)
        else:
            lines = []
            for index, seed in enumerate(self.seed):
                own = self._line({name: value[index] for name, value in metrics.items()}, seconds)
                lines.append(own | {name: value[index] for name, value in evaluation.items()})
                self.log.metrics(self.stage, step, lines[-1], seed)
            self.log.progress(step, {name: np.mean([line[name] for line in lines]) for name in lines[0]})
        if metrics:
            self.log.steps_done += 1
            self._watch(step, metrics)

    def _line(self, metrics: Metrics, seconds: float) -> Metrics:
        if not metrics:
            return {}
        speed = {"tokens_per_second": float(metrics["tokens"]) / seconds} if "tokens" in metrics else {}
        return {**metrics, "seconds": seconds, **speed}

    def _watch(self, step: int, metrics: Metrics) -> None:
        skipped = np.asarray(metrics.get("skipped", 0))
        self.skipped_in_row = int(np.max(metrics.get("skipped_in_row", 0)))
        worse = np.atleast_1d(skipped > self.skipped)
        self.skipped = skipped
        if not worse.any():
            return
        first = int(np.argmax(worse))
        bad_leaf = int(np.atleast_1d(metrics.get("bad_leaf", -1))[first])
        self.bad = (
            f"gradient of {self.leaf_names[bad_leaf]}"
            if bad_leaf >= 0
            else "loss or norm; every gradient leaf is finite"
        )
        whose = f" of seed {self.seed[first]}" if isinstance(self.seed, tuple) else ""
        warnings.warn(
            f"{self.stage}: the update{whose} at step {step} was skipped, it is not finite ({self.bad})",
            RuntimeWarning,
            stacklevel=3,
        )
