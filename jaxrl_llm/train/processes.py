"""Several processes that run one program: `jax.distributed` started, and the few words that they exchange on the host.

The same command is started once a process. All of them run the same steps on one mesh of all devices; process 0 alone
writes the record (`RunLog`), and each writes its own part of a checkpoint. What is not one of these functions needs no
telling how many processes there are. A process that dies takes the others with it, after at most 100 s; the same
commands again go on from the newest checkpoint.
"""

from __future__ import annotations

import socket
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

RETRY_SECONDS = 0.2


def start_processes(
    coordinator: str, processes: int | None = None, process: int | None = None, *, timeout: float = 300.0
) -> None:
    """Joins this process to the others. Before anything else asks jax for devices.

    Args:
      coordinator: `host:port`, where process 0 listens; or `auto` on a TPU pod, under Slurm, Open MPI or Kubernetes,
        where `jax.distributed` finds out all of it by itself.
      processes: how many there are.
      process: which of them this one is, from 0.
      timeout: seconds for all of them to come.

    Raises:
      ValueError: numbers missing or out of range; no such cluster found; an address without a port.
      TimeoutError: the coordinator does not answer; the message has its address.
    """
    # Its handler would swallow a SIGTERM during start-up; while a stage runs `vote` does what it is for.
    jax.config.update("jax_enable_preemption_service", False)
    if coordinator == "auto":
        jax.distributed.initialize(initialization_timeout=int(timeout), shutdown_timeout_seconds=60)
        return
    if processes is None or process is None or not 0 <= process < processes:
        raise ValueError(
            f"process={process} of processes={processes} at coordinator={coordinator!r}: give both, process from 0 to "
            "processes - 1; or coordinator='auto' on a cluster that tells"
        )
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"coordinator must be host:port, such as 10.0.0.1:8476, or 'auto', got {coordinator!r}")
    if process:
        _wait_for(host.strip("[]"), int(port), timeout)  # jax itself would abort the process, without the address
    jax.distributed.initialize(
        coordinator, processes, process, initialization_timeout=int(timeout), shutdown_timeout_seconds=60
    )


def is_writer() -> bool:
    """Whether this process keeps the record: process 0."""
    return jax.process_index() == 0


def largest(value: int) -> jax.Array | int:
    """The largest `value` of all processes, on its way (`int` waits for it); that of a single process at once.

    All must call it, in the same order among their other programs.
    """
    if jax.process_count() == 1:
        return value
    mesh = Mesh(np.asarray(jax.devices()), ("process",))
    sharding = NamedSharding(mesh, PartitionSpec("process"))
    with jax.set_mesh(mesh):
        each = jax.make_array_from_callback((mesh.size,), sharding, lambda _: np.full(1, value, np.int32))
        return _maximum(each)


def all_agree(here: bool) -> bool:
    """Whether it is so in all processes."""
    return not int(largest(not here))


def wait_for_all() -> None:
    """Returns once all processes have come here: behind it they may read what one of them wrote before it."""
    int(largest(0))


def fetch(tree: PyTree) -> PyTree:
    """All arrays as NumPy arrays, whole in every process, wherever their parts lie. All processes must call it."""

    def one(leaf: Any) -> Any:
        if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            return multihost_utils.process_allgather(leaf, tiled=True)
        return jax.device_get(leaf)

    return jax.tree.map(one, tree)


@jax.jit
def _maximum(values: jax.Array) -> jax.Array:
    return jnp.max(values)


def _wait_for(host: str, port: int, timeout: float) -> None:
    end = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((host, port), timeout=max(end - time.monotonic(), RETRY_SECONDS)).close()
            return
        except OSError as error:
            if time.monotonic() + RETRY_SECONDS > end:
                raise TimeoutError(
                    f"the coordinator {host}:{port} did not answer within {timeout:g} s ({error}). Is process 0 "
                    "running, with the same --coordinator, and can its port be reached from here?"
                ) from error
            time.sleep(RETRY_SECONDS)
