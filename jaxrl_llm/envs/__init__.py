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
from jaxrl_llm.envs.protocols import AgentsEnv, DeviceEnv, HostEnv
from jaxrl_llm.envs.rooms import RoomsEnv
from jaxrl_llm.envs.single_turn import SingleTurnEnv
from jaxrl_llm.envs.tool_env import ToolEnv, Trajectory, Turn
from jaxrl_llm.envs.tool_protocols import (
    CHAT,
    HERMES,
    REACT,
    SEARCH_R1,
    Call,
    Malformed,
    Parsed,
    Protocol,
    transcript_spans,
)

__all__ = [
    "AgentsEnv",
    "CHAT",
    "Call",
    "DeviceEnv",
    "GeographyEnv",
    "GeographyHostEnv",
    "GeographyState",
    "GeographyTask",
    "HERMES",
    "HostEnv",
    "Malformed",
    "Parsed",
    "Protocol",
    "REACT",
    "RoomsEnv",
    "SEARCH_R1",
    "SingleTurnEnv",
    "ToolEnv",
    "Trajectory",
    "Turn",
    "encode_tasks",
    "make_geography_env",
    "make_geography_host_env",
    "transcript_spans",
]
