"""What a policy talks to: the two kinds of environment, and those that come with the library."""

from jaxrl_llm.envs.geography import (
    GeographyEnv,
    GeographyHostEnv,
    GeographyState,
    GeographyTask,
    encode_tasks,
    make_geography_env,
    make_geography_host_env,
)
from jaxrl_llm.envs.protocols import DeviceEnv, HostEnv
from jaxrl_llm.envs.single_turn import SingleTurnEnv

__all__ = [
    "DeviceEnv",
    "GeographyEnv",
    "GeographyHostEnv",
    "GeographyState",
    "GeographyTask",
    "HostEnv",
    "SingleTurnEnv",
    "encode_tasks",
    "make_geography_env",
    "make_geography_host_env",
]
