"""Where a trainer's rollouts come from: made in this process when they are wanted, or by workers all the time.

A page says how rollouts are made and what an update does with them, once:

    def make_sample(config):                          # called once in every process that samples
        world, agent = make_world(config), make_agent(config)
        def play(params, seed, number): ...           # -> Rollout; keys are folded from (seed, number)
        return distributed.device_sampler(play, config.seed)

    state = distributed.loop(init, update, make_sample, steps=config.steps, log=log)      # update(state, rollout)

With `config.distributed.workers=0`, the default, step i samples rollout i under its own parameters and then updates, in
this process. With more, as many Ray actors sample without waiting for the trainer, which takes what is finished.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import PyTree
from ml_collections import ConfigDict

from jaxrl_llm import ops, train
from jaxrl_llm.sampling import join_rollouts
from jaxrl_llm.types import Metrics, Params, Rollout, TrainState

Partial = jax.tree_util.Partial
Newest = Callable[[], tuple[Params, int]]
Sampler = Callable[[Newest, Any, int], PyTree]  # sample(newest, seed, number)


def settings(**changed: Any) -> dict[str, Any]:
    """The entry `distributed` of a config, with its defaults; `changed` replaces some of them.

    Raises:
      ValueError: a setting of another name.
    """
    entries: dict[str, Any] = {
        "workers": 0,  # processes that sample; 0: the trainer's own
        "max_staleness": 2,  # a rollout is trained on at most so many updates after the weights that began it
        "rollouts_per_step": 1,  # what `make_sample` makes at a time, joined into one batch
        "importance_cap": 2.0,  # of the weights that correct for older parameters
        "address": None,  # of a Ray cluster, "host:6379"; None: one that lives as long as the trainer
        "connect_seconds": 30.0,  # until an address that does not answer is given up
        "rollout_seconds": None,  # until a worker that makes one rollout is killed; None: never
        "worker": {"num_cpus": 1.0, "num_gpus": 0.0, "resources": {}},  # what each takes of the cluster
        "mesh": {"data": 1, "fsdp": 1, "tensor": 1, "sequence": 1, "expert": 1},  # of each worker's devices
        "object_store_mb": 500,  # for weights and rollouts on their way, in a cluster of our own
    }
    if unknown := set(changed) - set(entries):
        raise ValueError(f"unknown settings {sorted(unknown)} of distributed; there are {', '.join(entries)}")
    return entries | changed


class Taken(NamedTuple):
    """A batch: what was sampled, and counts that belong to the metrics of its step."""

    samples: PyTree
    counts: dict[str, Any]


class Source(Protocol):
    """What `loop` needs of either form."""

    def take(self, step: int) -> Taken:
        """The samples of the update after `step` finished ones. The same step again gives the same."""

    def publish(self, params: Params, version: int) -> None:
        """From now on, rollouts are sampled under these parameters, those after `version` updates."""


def source(
    make_sample: Callable[[Any], Sampler], *, steps: int, log: train.RunLog, stage: str = "train"
) -> AbstractContextManager[Source]:
    """The source that `log.config.distributed` describes, to be entered.

    Args:
      make_sample: `make_sample(config) -> sample`, where `sample(newest, seed, number)` makes the rollout of that
        number: a pytree of `Rollout`s and arrays that share their first axis. `newest()` gives parameters and their
        version; a sampler on the host asks for them again and again (`sampling.host_rollout` takes it as `params`), and
        a rollout that is under way goes on under new weights. For workers it is a function of a module.
      steps: of the stage; nothing is sampled for more.

    Raises:
      ValueError: a setting out of range, or what workers cannot do.
    """
    config = log.config
    entry = config.get("distributed") or {}
    chosen = settings(**(entry.to_dict() if isinstance(entry, ConfigDict) else entry))
    for name, least in (("workers", 0), ("max_staleness", 0), ("rollouts_per_step", 1)):
        if chosen[name] < least:
            raise ValueError(f"config.distributed.{name} must be at least {least}, got {chosen[name]}")
    seed = config.get("seed", 0)
    if isinstance(seed, Sequence) and (chosen["workers"] or chosen["rollouts_per_step"] > 1):
        raise ValueError(
            f"config.seed={tuple(seed)}: several seeds in one run need config.distributed.workers=0 and "
            "rollouts_per_step=1; give each seed a run of its own"
        )
    if not chosen["workers"]:
        return InProcess(make_sample(config), seed, chosen["rollouts_per_step"])
    if jax.process_count() > 1:
        raise ValueError(
            f"config.distributed.workers={chosen['workers']} with a trainer of {jax.process_count()} processes: "
            "workers are sent the weights by one process that sees all of them"
        )
    from jaxrl_llm.distributed.workers import WorkerPool

    return WorkerPool(make_sample, config, chosen, steps=steps, log=log, stage=stage)


class InProcess:
    """Samples in the trainer's process, under the parameters of the step."""

    def __init__(self, sample: Sampler, seed: Any, rollouts_per_step: int) -> None:
        self._sample, self._seed, self._per_step = sample, seed, rollouts_per_step

    def __enter__(self) -> InProcess:
        return self

    def __exit__(self, *exception: Any) -> None:
        pass

    def publish(self, params: Params, version: int) -> None:
        """See `Source`."""
        self._newest = (params, version)

    def take(self, step: int) -> Taken:
        """See `Source`."""
        numbers = range(step * self._per_step, (step + 1) * self._per_step)
        return Taken(join_samples([self._sample(lambda: self._newest, self._seed, n) for n in numbers]), {})


def loop(
    init: Callable[..., TrainState],
    update: Callable[[TrainState, PyTree], tuple[TrainState, Metrics]],
    make_sample: Callable[[Any], Sampler],
    *,
    steps: int,
    log: train.RunLog,
    policy: Callable[[Params], Params] = lambda params: params,
    stage: str = "train",
    **options: Any,
) -> TrainState:
    """`train.loop` over sampled rollouts; the same call in one process and in several.

    To the metrics of each step it adds `staleness` and `staleness_max`, in updates, over the policy's tokens, and with
    workers `rollouts_dropped` (too old) and `worker_restarts`, both counted from the beginning.

    Args:
      init, steps, log, stage: as in `train.loop`.
      update: `update(state, samples) -> (state, metrics)`; pure. May be a `jax.tree_util.Partial`.
      make_sample: see `source`.
      policy: the part of the parameters that samples.
      options: further arguments of `train.loop`.

    Raises:
      ValueError: as `source` and `train.loop`.
      RuntimeError: a rollout failed again and again, or workers die as soon as they are started.
    """
    bound = update if isinstance(update, Partial) else Partial(update)
    with source(make_sample, steps=steps, log=log, stage=stage) as rollouts:
        return train.loop(
            init,
            Partial(_update_and_measure, bound),
            steps=steps,
            log=log,
            stage=stage,
            batch=rollouts.take,
            publish=lambda step, state: rollouts.publish(policy(state.params), step),
            **options,
        )


def _update_and_measure(update: Callable, state: TrainState, taken: Taken) -> tuple[TrainState, Metrics]:
    ages = staleness(taken.samples, state.step)
    state, metrics = update(state, taken.samples)
    return state, {**metrics, **ages, **taken.counts}


def staleness(samples: PyTree, step: Any) -> Metrics:
    """`staleness` and `staleness_max`: updates between the weights that drew a token and `step`, over the policy's
    tokens of all rollouts in `samples`. Empty where no rollout has versions."""
    rollouts = [leaf for leaf in jax.tree.leaves(samples, is_leaf=_is_rollout) if _is_rollout(leaf)]
    known = [rollout for rollout in rollouts if rollout.versions is not None]
    if not known:
        return {}
    mask = jnp.concatenate([rollout.mask.ravel() for rollout in known])
    age = jnp.where(mask, step - jnp.concatenate([rollout.versions.ravel() for rollout in known]), 0)
    return {"staleness": ops.masked_mean(age.astype(jnp.float32), mask), "staleness_max": jnp.max(age)}


def device_sampler(play: Callable[[Params, jax.Array, jax.Array], PyTree], seed: int | tuple[int, ...]) -> Sampler:
    """A sampler of a pure `play(params, seed, number)`, such as one that calls `sampling.rollout`, compiled once.

    Its rollouts are made under one version of the weights from beginning to end, which is written down for each token.

    Args:
      play: may be a `jax.tree_util.Partial`: see `train.over_seeds`.
      seed: `config.seed`; with several, `play` is mapped over them.
    """
    bound = play if isinstance(play, Partial) else Partial(play)
    run = train.over_seeds(Partial(_play_and_date, bound), seed, num_shared=2)

    def sample(newest: Newest, seed: Any, number: int) -> PyTree:
        params, version = newest()
        return run(params, jnp.asarray(seed, jnp.int32), jnp.int32(number), jnp.int32(version))

    return sample


def _play_and_date(play: Callable, params: Params, seed: jax.Array, number: jax.Array, version: jax.Array) -> PyTree:
    def date(leaf: Any) -> Any:
        return dataclasses.replace(leaf, versions=jnp.where(leaf.mask, version, -1)) if _is_rollout(leaf) else leaf

    return jax.tree.map(date, play(params, seed, number), is_leaf=_is_rollout)


def join_samples(samples: Sequence[PyTree]) -> PyTree:
    """Pytrees of the same structure as one: rollouts joined as `sampling.join_rollouts`, arrays along their first
    axis."""
    if len(samples) == 1:
        return samples[0]

    def join(*leaves: Any) -> Any:
        return join_rollouts(leaves) if _is_rollout(leaves[0]) else jnp.concatenate(leaves)

    return jax.tree.map(join, *samples, is_leaf=_is_rollout)


def _is_rollout(leaf: Any) -> bool:
    return isinstance(leaf, Rollout)
