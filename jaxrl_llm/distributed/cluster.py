"""A Ray cluster to work in: one of our own that lives as long as this process, or one with an address.

A process whose cluster loses its head is ended by Ray itself, with exit code 1, or finds no node alive and raises
`HeadLost`. Nothing is tried in place: the run's command (`supervisor`) starts the process again, which starts a cluster
again, and goes on from checkpoint and ledger.
"""

from __future__ import annotations

import contextlib
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from typing import Any

# How long Ray waits for a lost head before it ends a process; its own default is a minute.
RECONNECT_SECONDS = 15


class HeadLost(ConnectionError):
    """The head of the Ray cluster, or its only node, is gone."""


@contextlib.contextmanager
def cluster(
    address: str | None = None, *, num_cpus: float = 1.0, object_store_mb: int = 500, connect_seconds: float = 30.0
) -> Iterator[None]:
    """Within this context, Ray is there. If this process is in a cluster already, that one is used, and left open.

    Args:
      address: "host:port" of a cluster's head. None: starts one here with `num_cpus` and an object store of
        `object_store_mb` (of 10^6 bytes), and ends it on leaving.
      connect_seconds: until an address is given up.

    Raises:
      ConnectionError: nobody answers at `address` within `connect_seconds`.
      HeadLost: Ray cannot be started here.
      ModuleNotFoundError: Ray is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", str(RECONNECT_SECONDS))
    try:
        import ray
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "config.distributed.workers above 0 needs Ray: pip install 'jaxrl_llm[distributed]', or ray by itself"
        ) from error
    if ray.is_initialized():
        yield
        return
    if address is not None:
        check_address(address, connect_seconds)
    with warnings.catch_warnings(), lost_head():
        warnings.filterwarnings("ignore", "os.fork", RuntimeWarning)  # of jax; what follows the fork is another program
        if address is None:
            ray.init(
                address="local",
                num_cpus=math.ceil(num_cpus) + 1,
                object_store_memory=object_store_mb * 10**6,
                include_dashboard=False,
                configure_logging=False,
            )
        else:
            ray.init(address=address, configure_logging=False)
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def lost_head() -> Iterator[None]:
    """Within this context, an error of Ray itself is a `HeadLost`: a new process, with a new cluster, may do better."""
    import ray

    try:
        yield
    except (ray.exceptions.RayError, RuntimeError, OSError) as error:
        raise HeadLost(f"Ray does not answer ({type(error).__name__}: {str(error):.300})") from error


def start_actor(kind: type, *arguments: Any, **options: Any) -> Any:
    """An object of class `kind` in a process of its own; `options` as those of a Ray actor."""
    import ray

    remote: Any = ray.remote(kind)
    return remote.options(**options).remote(*arguments)


def result_of(reference: Any) -> Any:
    """What a call of an actor returned; what it raised is raised here as it was.

    Raises:
      ray.exceptions.RayActorError: the actor's process is gone.
    """
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise (error.cause or error) from error


def check_address(address: str, seconds: float) -> None:
    """Asks a head whether it is well; in a process of its own, as Ray ends one that waits for a head in vain.

    Raises:
      ConnectionError: it does not say so within `seconds`.
    """
    command = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        raise ConnectionError(
            f"no Ray cluster answers at {address} within {seconds:g} seconds; look at the address and at the firewall, "
            "or set config.distributed.address=None for a cluster of this run's own"
        ) from None
    if done.returncode:
        reason = (done.stderr.strip() or done.stdout.strip() or "not healthy").splitlines()[-1]
        raise ConnectionError(
            f"no Ray cluster answers at {address} ({reason:.200}); `ray start --head` starts one, and "
            "config.distributed.address=None has one of this run's own"
        )


def check_head() -> None:
    """Raises `HeadLost` if no node of the cluster is alive."""
    import ray

    if not any(node["Alive"] for node in ray.nodes()):
        raise HeadLost("the Ray cluster has no node that is alive; the same command again starts anew and goes on")
