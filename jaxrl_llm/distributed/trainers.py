"""Several trainers with different models, which exchange finished samples and numbers, and no gradients (M-GRPO).

def main_trainer(store):                      # each has a model, an optimizer and a workdir of its own
    ...
    store.commit("sub", sub_trajectory, id=f"{number}-{place}", reward=main_reward)
def sub_trainer(store):
    train.loop(..., batch=lambda step: to_batch(wait_for(store, "sub", step, 8)))

results = run_trainers({"main": main_trainer, "sub": sub_trainer}, "out/exchange", processes=True)
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from jaxrl_llm.distributed.cluster import check_head, cluster, result_of, start_actor
from jaxrl_llm.distributed.store import Fetched, SampleStore

MOST_DEATHS = 5  # of one trainer
Trainer = Callable[[Any], Any]


class RemoteStore:
    """A `SampleStore` in another process: the same methods. What a killed store was asked is asked of the next one,
    which reads the ledger; a commit that had already been written then returns False."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("_") or not hasattr(SampleStore, name):
            raise AttributeError(f"a SampleStore has no method {name!r}")

        return lambda *arguments, **options: result_of(getattr(self.actor, name).remote(*arguments, **options))

    def __reduce__(self) -> tuple[type[RemoteStore], tuple[Any]]:
        return RemoteStore, (self.actor,)


def run_trainers(
    trainers: Mapping[str, Trainer],
    folder: str | Path,
    *,
    processes: bool = False,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    **cluster_options: Any,
) -> dict[str, Any]:
    """Runs every trainer to its end, side by side, with one `SampleStore` in `folder` between them.

    The same call again goes on where the last one ended, as far as the trainers do: the store is durable, and a trainer
    that asks for a step again is given the same samples.

    Args:
      trainers: by name, `trainer(store) -> result`.
      processes: each in a process of its own, as a Ray actor, which is started again if it is killed; else each in a
        thread of this process. For processes they are functions of a module, or can be pickled.
      options: by name, what a trainer takes of the cluster: `{"main": {"num_gpus": 8}}`.
      cluster_options: of `cluster`: `address` and the like.

    Returns:
      Their results, by name.

    Raises:
      ValueError: options for a trainer that there is not.
      RuntimeError: a trainer was killed again and again.
      what a trainer raised first.
    """
    options = options or {}
    if unknown := sorted(set(options) - set(trainers)):
        raise ValueError(f"options for {unknown}, but the trainers are {', '.join(trainers)}")
    if not processes:
        with contextlib.closing(SampleStore(folder)) as store:
            return _side_by_side({name: functools.partial(trainer, store) for name, trainer in trainers.items()})
    with cluster(**{"num_cpus": len(trainers), **cluster_options}):
        import ray

        again = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1, "max_concurrency": 8}
        remote = RemoteStore(start_actor(SampleStore, Path(folder).absolute(), **again))
        try:
            return _side_by_side(
                {
                    name: functools.partial(_run_in_actor, name, trainer, remote, options.get(name, {}))
                    for name, trainer in trainers.items()
                }
            )
        finally:
            ray.kill(remote.actor)


def wait_for(
    store: Any, key: str, step: int, count: int, *, timeout: float | None = None, poll_seconds: float = 0.05
) -> Fetched:
    """`store.fetch`, once there are enough samples.

    Raises:
      TimeoutError: there are not within `timeout` seconds.
    """
    began = time.monotonic()
    while (fetched := store.fetch(key, step, count)) is None:
        if timeout is not None and time.monotonic() - began > timeout:
            raise TimeoutError(f"fewer than {count} samples of {key!r} for step {step} after {timeout:g} seconds")
        time.sleep(poll_seconds)
    return fetched


class TrainerProcess:
    """What runs in the process of a trainer."""

    def run(self, trainer: Trainer, store: RemoteStore) -> Any:
        """The trainer, to its end."""
        return trainer(store)


def _run_in_actor(name: str, trainer: Trainer, store: RemoteStore, options: Mapping[str, Any]) -> Any:
    import ray

    for _ in range(MOST_DEATHS):
        actor = start_actor(TrainerProcess, **options)
        try:
            return result_of(actor.run.remote(trainer, store))
        except ray.exceptions.RayActorError as error:
            check_head()
            last = error
        finally:
            ray.kill(actor)
    raise RuntimeError(f"trainer {name!r} ended {MOST_DEATHS} times before it was done; the last time: {last}")


def _side_by_side(functions: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
    """Results by name; as soon as one raises, that is raised, and the others are left behind."""
    pool = ThreadPoolExecutor(len(functions))
    futures = {name: pool.submit(function) for name, function in functions.items()}
    try:
        for future in wait(futures.values(), return_when=FIRST_EXCEPTION).done:
            future.result()
        return {name: future.result() for name, future in futures.items()}
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
