"""Rollout workers on Ray: each a process with its own JAX, which samples under the newest weights that it was sent.

One thread of the trainer's process hands out numbers and takes rollouts in. A number is with one worker at a time until
its rollout is in the store, which is on the disk; that is the acknowledgement. Whatever happens to the worker before,
the number is handed out again, and its keys are folded from (seed, number) anew.
"""

from __future__ import annotations

import contextlib
import dataclasses
import heapq
import pickle
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from jaxrl_llm import train
from jaxrl_llm.distributed.cluster import check_head, cluster, lost_head, start_actor
from jaxrl_llm.distributed.source import Sampler, Taken, join_samples
from jaxrl_llm.distributed.store import SampleStore, read_ledger
from jaxrl_llm.types import Params, Rollout

POLL_SECONDS = 0.05
MOST_FAILURES = 3  # of one rollout, by an exception
MOST_DEATHS = 5  # of one worker, without a rollout between them


def rollout_capacity(
    version: int, accepted: int, running: int, *, max_staleness: int, batch: int, max_concurrent: int
) -> int:
    """How many more rollouts may begin now, under weights after `version` updates of `batch` rollouts each.

    With the rollouts `accepted` so far and those `running`, one that begins now is wanted by update `version +
    max_staleness` at the latest if rollouts are taken in the order in which they began (AReaL, Fu et al. 2025, sec. 5;
    the released code of ASearcher).

    Returns:
      `min(max_concurrent - running, (version + max_staleness + 1) * batch - accepted - running)`, at least 0.
    """
    allowed = (version + max_staleness + 1) * batch - accepted - running
    return max(0, min(max_concurrent - running, allowed))


class RolloutWorker:
    """What runs in a worker's process, as a Ray actor with two threads: one samples, one receives weights."""

    def __init__(self, make_sample: Callable[[Any], Sampler], config: Any, cache: str | None) -> None:
        if cache:
            train.enable_compilation_cache(cache)
        self._mesh = config.distributed
        with train.use_mesh(self._mesh):
            self._sample = make_sample(config)
        self._news = threading.Condition()
        self._newest: tuple[Params, int] | None = None

    def receive(self, version: int, params: Params) -> None:
        """Takes weights, which a rollout that is under way may ask for from now on."""
        with train.use_mesh(self._mesh):
            params = jax.device_put(train.shard_state(params))
        with self._news:
            if self._newest is None or version > self._newest[1]:
                self._newest = (params, version)
                self._news.notify_all()

    def sample(self, seed: int, number: int) -> tuple[bytes, float, dict[str, Any]]:
        """Rollout `number`, pickled; its mean reward; the oldest and the newest version of the weights that it saw."""
        versions = []
        began = time.monotonic()

        def newest() -> tuple[Params, int]:
            with self._news:
                self._news.wait_for(lambda: self._newest is not None)
                assert self._newest is not None
                versions.append(self._newest[1])
                return self._newest

        with train.use_mesh(self._mesh):
            samples = jax.device_get(self._sample(newest, seed, number))
        facts = {"version": min(versions), "newest_version": max(versions)}
        facts["seconds"] = round(time.monotonic() - began, 3)  # type: ignore[assignment]
        return pickle.dumps(samples, protocol=pickle.HIGHEST_PROTOCOL), mean_reward(samples), facts


def mean_reward(samples: PyTree) -> float:
    """Over all rows of all rollouts that could be scored; 0 where there are none."""
    rollouts = jax.tree.leaves(samples, is_leaf=lambda leaf: isinstance(leaf, Rollout))
    scored = [np.asarray(one.rewards)[np.asarray(one.scorable)] for one in rollouts if isinstance(one, Rollout)]
    rewards = np.concatenate([*scored, np.zeros(0, np.float32)])
    return float(rewards.mean()) if rewards.size else 0.0


@dataclasses.dataclass(eq=False)
class _Worker:
    """The trainer's side of a worker."""

    index: int
    actor: Any
    deaths: int = 0  # since its last rollout


@dataclasses.dataclass(eq=False)
class _Run:
    """A rollout under way."""

    worker: _Worker
    number: int
    began: float


class WorkerPool:
    """A `Source` whose rollouts come from workers. See `source`."""

    def __init__(
        self,
        make_sample: Callable[[Any], Sampler],
        config: Any,
        settings: dict[str, Any],
        *,
        steps: int,
        log: train.RunLog,
        stage: str,
    ) -> None:
        self._make_sample, self._config, self._settings = make_sample, config, settings
        self._per_step = settings["rollouts_per_step"]
        self._total = steps * self._per_step
        self._log, self._stage, self._seed = log, stage, config.get("seed", 0)
        self._folder = log.workdir / "rollouts"

    def __enter__(self) -> WorkerPool:
        self._exit = contextlib.ExitStack()
        self._begun = self._closing = False
        return self

    def __exit__(self, *exception: Any) -> None:
        self._closing = True
        self._exit.close()

    def _begin(self) -> None:
        """Opens cluster and store, and starts the workers; not before they are needed."""
        settings = self._settings
        needed = settings["workers"] * settings["worker"]["num_cpus"]
        options = {name: settings[name] for name in ("address", "object_store_mb", "connect_seconds")}
        self._exit.enter_context(cluster(num_cpus=needed, **options))
        self._store = SampleStore(self._folder)
        self._exit.callback(self._store.close)
        self._news = threading.Condition()  # guards what follows
        lines = [line for line in read_ledger(self._folder) if line["key"] == self._stage]
        self._dropped = sum(line["event"] == "dropped" for line in lines)
        self._restarts = max([line["worker_restarts"] for line in lines if line["event"] == "fetched"], default=0)
        known = {int(id) for id in self._store.ids(self._stage)}
        self._numbers = [number for number in range(self._total) if number not in known]  # a heap: the lowest first
        self._failures: Counter[int] = Counter()
        self._failure: BaseException | None = None
        self._running: dict[Any, _Run] = {}
        self._idle = [_Worker(index, self._start()) for index in range(settings["workers"])]
        self._exit.callback(self._stop)
        thread = threading.Thread(target=self._serve, name="rollout workers", daemon=True)
        self._exit.callback(thread.join)
        thread.start()
        self._begun = True

    def publish(self, params: Params, version: int) -> None:
        """See `Source`. The weights are copied to the host here; the workers fetch them from there."""
        import ray

        if version * self._per_step >= self._total:
            return
        if not self._begun:
            self._version, self._weights = -1, None
            self._begin()
        host = jax.device_get(params)
        with lost_head(), self._news:
            self._version, self._weights = version, ray.put(host)
            for worker in self._workers():
                worker.actor.receive.remote(version, self._weights)
        if saved := train.finished_steps(self._log.workdir / "checkpoints" / self._stage):
            self._store.release(self._stage, before=saved[0])

    def take(self, step: int) -> Taken:
        """See `Source`. Waits until enough rollouts are there that are not too old for the step."""
        with self._news:
            while True:
                if self._failure is not None:
                    raise self._failure
                self._drop_stale(step)
                fetched = self._store.fetch(self._stage, step, self._per_step, self._counts)
                if fetched is not None:
                    break
                self._news.wait(1.0)
        samples = sorted(fetched.samples, key=lambda sample: int(sample.id))
        counts = {name: np.int32(count) for name, count in fetched.facts.items()}
        return Taken(join_samples([pickle.loads(sample.value) for sample in samples]), counts)

    def _counts(self) -> dict[str, int]:
        return {"rollouts_dropped": self._dropped, "worker_restarts": self._restarts}

    def _workers(self) -> list[_Worker]:
        return [*self._idle, *(run.worker for run in self._running.values())]

    def _start(self) -> Any:
        """A new process for a worker, which is sent the weights if there are any."""
        flags: Any = jax.config
        arguments = (self._make_sample, self._config, flags.jax_compilation_cache_dir)
        actor = start_actor(RolloutWorker, *arguments, max_concurrency=2, **self._settings["worker"])
        if self._weights is not None:
            actor.receive.remote(self._version, self._weights)
        return actor

    def _stop(self) -> None:
        import ray

        with contextlib.suppress(Exception):  # the cluster may be gone, and they with it
            for worker in self._workers():
                ray.kill(worker.actor)

    def _serve(self) -> None:
        """Hands numbers out and takes rollouts in, until the source is closed or cannot go on."""
        import ray

        try:
            while not self._closing:
                with self._news:
                    self._hand_out()
                    running = list(self._running)
                if not running:
                    time.sleep(POLL_SECONDS)
                    continue
                with lost_head():
                    done, _ = ray.wait(running, timeout=POLL_SECONDS)
                with self._news:
                    for reference in done:
                        self._take_in(self._running.pop(reference), reference)
                    self._stop_hanging()
                    self._news.notify_all()
        except BaseException as error:  # whatever it is, it is raised where the trainer waits
            with self._news:
                self._failure = error
                self._news.notify_all()

    def _hand_out(self) -> None:
        accepted = len(self._store.ids(self._stage))
        while self._idle and self._numbers and self._version >= 0:
            if not rollout_capacity(
                self._version,
                accepted,
                len(self._running),
                max_staleness=self._settings["max_staleness"],
                batch=self._per_step,
                max_concurrent=self._settings["workers"],
            ):
                return
            worker, number = self._idle.pop(0), heapq.heappop(self._numbers)
            reference = worker.actor.sample.remote(self._seed, number)
            self._running[reference] = _Run(worker, number, time.monotonic())

    def _take_in(self, run: _Run, reference: Any) -> None:
        """Puts a finished rollout into the store; hands its number out again if there is none."""
        import ray

        try:
            content, reward, facts = ray.get(reference)
        except ray.exceptions.RayTaskError as error:  # raised by the sampler: the worker is well
            self._failures[run.number] += 1
            if self._failures[run.number] == MOST_FAILURES:
                raise RuntimeError(
                    f"rollout {run.number} of seed {self._seed} failed {MOST_FAILURES} times: {error.cause!r}"
                ) from error
            self._log.info(f"rollout {run.number} failed and is sampled again: {error.cause!r:.200}")
        except ray.exceptions.RayError as error:  # the worker's process is gone
            self._replace(run.worker, error)
        else:
            run.worker.deaths = 0
            if self._version - facts["version"] > self._settings["max_staleness"]:
                self._drop(run.number)
            else:
                facts |= {"worker": run.worker.index, "seed": self._seed}
                self._store.commit(self._stage, content, id=str(run.number), reward=reward, **facts)
        self._idle.append(run.worker)
        if str(run.number) not in self._store.ids(self._stage) and run.number not in self._numbers:
            heapq.heappush(self._numbers, run.number)

    def _replace(self, worker: _Worker, error: Exception) -> None:
        check_head()
        worker.deaths += 1
        if worker.deaths > MOST_DEATHS:
            raise RuntimeError(
                f"rollout worker {worker.index} ended {worker.deaths} times in a row before it finished a rollout; the "
                f"last time: {error}"
            ) from error
        self._restarts += 1
        self._log.info(f"rollout worker {worker.index} ended and is started again ({type(error).__name__})")
        worker.actor = self._start()

    def _stop_hanging(self) -> None:
        """Kills workers that have taken too long; their rollouts then end as those of any killed worker."""
        import ray

        limit = self._settings["rollout_seconds"]
        for run in self._running.values():
            if limit is not None and time.monotonic() - run.began > limit:
                self._log.info(f"rollout worker {run.worker.index} has hung for {limit:g} seconds and is killed")
                run.began = time.monotonic()
                ray.kill(run.worker.actor)

    def _drop_stale(self, step: int) -> None:
        """Drops what has waited for too long. What a step was given before is not asked about again."""
        for line in self._store.waiting(self._stage):
            if step - line["version"] > self._settings["max_staleness"]:
                self._drop(int(line["id"]))

    def _drop(self, number: int) -> None:
        """A rollout that is too old is sampled again, under newer weights: no task is left out for being slow."""
        self._store.drop(self._stage, str(number), "stale")
        self._dropped += 1
        if number not in self._numbers:
            heapq.heappush(self._numbers, number)
