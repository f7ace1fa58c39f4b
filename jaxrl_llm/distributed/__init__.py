"""Runs in several processes: rollout workers, further trainers and tool servers on Ray; and the same in one."""

from jaxrl_llm.distributed.cluster import HeadLost, cluster
from jaxrl_llm.distributed.source import (
    InProcess,
    Sampler,
    Source,
    Taken,
    device_sampler,
    join_samples,
    loop,
    settings,
    source,
    staleness,
)
from jaxrl_llm.distributed.store import Fetched, Sample, SampleStore, audit, read_ledger
from jaxrl_llm.distributed.supervisor import FAILED, die_with_supervisor, supervise, workdir_progress
from jaxrl_llm.distributed.tool_servers import served_tools
from jaxrl_llm.distributed.trainers import RemoteStore, run_trainers, wait_for
from jaxrl_llm.distributed.workers import WorkerPool, rollout_capacity

__all__ = [
    "FAILED",
    "Fetched",
    "HeadLost",
    "InProcess",
    "RemoteStore",
    "Sample",
    "SampleStore",
    "Sampler",
    "Source",
    "Taken",
    "WorkerPool",
    "audit",
    "cluster",
    "device_sampler",
    "die_with_supervisor",
    "join_samples",
    "loop",
    "read_ledger",
    "rollout_capacity",
    "run_trainers",
    "served_tools",
    "settings",
    "source",
    "staleness",
    "supervise",
    "wait_for",
    "workdir_progress",
]
