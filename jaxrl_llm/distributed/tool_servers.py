"""Tools in a process of their own, which several workers share; without a cluster, in this one."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from jaxrl_llm.distributed.cluster import result_of, start_actor
from jaxrl_llm.tools import Tool


class ToolServer:
    """What runs in the process: the tools, called from several threads at a time."""

    def __init__(self, make_tools: Callable[[], Sequence[Tool]]) -> None:
        self._tools = {tool.name: tool for tool in make_tools()}

    def describe(self) -> list[tuple[str, str, Any]]:
        """Name, description and parameters of each tool."""
        return [(tool.name, tool.description, tool.parameters) for tool in self._tools.values()]

    def call(self, name: str, arguments: dict[str, Any]) -> Any:
        """What a tool returns, or raises."""
        result = self._tools[name].call(**arguments)
        return asyncio.run(result) if inspect.iscoroutine(result) else result


def served_tools(
    make_tools: Callable[[], Sequence[Tool]], *, name: str, threads: int = 16, **options: Any
) -> list[Tool]:
    """The tools of the server `name`, which the first process that asks for it starts; inside of a Ray cluster, such as
    in `make_sample` of a worker. Elsewhere just `make_tools()`: the same code serves both.

    A call is made once. If the server is killed, the calls it had raise ConnectionError, which an environment repeats
    as often as its call limits allow, and the next call finds another server.

    Args:
      make_tools: a function of a module, called in the process of the server.
      threads: calls that a server answers at a time.
      options: what it takes of the cluster: `num_cpus` (default 0), `resources`.
    """
    try:
        import ray
    except ModuleNotFoundError:
        return list(make_tools())
    if not ray.is_initialized():
        return list(make_tools())

    def start() -> Any:
        again = {"max_restarts": -1, "max_concurrency": threads, "num_cpus": 0}
        return start_actor(ToolServer, make_tools, name=f"tools {name}", get_if_exists=True, **(again | options))

    def describe(server: Any) -> list[tuple[str, str, Any]]:
        """Waits for a server that is being started, or started again."""
        return result_of(server.describe.options(max_task_retries=-1).remote())

    held = [start()]  # as Ray ends an actor that nobody holds
    described = describe(held[0])

    def caller(tool: str) -> Callable[..., Any]:
        def call(**arguments: Any) -> Any:
            try:
                return result_of(held[0].call.remote(tool, arguments))
            except ray.exceptions.RayActorError as error:
                try:
                    describe(held[0])
                except ray.exceptions.RayActorError:  # whoever had started it has ended, and the server with it
                    held[0] = start()
                raise ConnectionError(f"the tool server {name!r} ended during a call of {tool}") from error

        return call

    return [Tool(tool, description, parameters, caller(tool)) for tool, description, parameters in described]
