"""Slow calls beside a device that decodes on: threads for plain functions, an event loop for async ones, time-outs and
retries for both."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, NamedTuple

import tenacity

CLEAN_UP_SECONDS = 1.0  # that async functions have to end after the last of them is wanted


class CallLimits(NamedTuple):
    """How long an environment may take, and how often it is asked again.

    Attributes:
      timeout: seconds that one attempt may take; None waits for ever.
      retries: further attempts after one that failed or took too long. An environment's `step` leaves the state it was
        given as it is, so that a second attempt starts where the first did.
      backoff: seconds before the first retry; each further one waits twice as long, up to a minute.
      in_flight: calls that run at a time.

    Raises:
      ValueError: from `check`, for a number that makes no sense.
    """

    timeout: float | None = 30.0
    retries: int = 2
    backoff: float = 0.1
    in_flight: int = 256

    def check(self) -> None:
        if self.timeout is not None and not self.timeout > 0:
            raise ValueError(f"timeout must be positive seconds or None, got {self.timeout}")
        if self.retries < 0 or self.backoff < 0:
            raise ValueError(f"retries and backoff must be at least 0, got {self.retries} and {self.backoff}")
        if self.in_flight < 1:
            raise ValueError(f"in_flight must be at least 1, got {self.in_flight}")


class Outcome(NamedTuple):
    """What became of a call: its value, or None and the last error; and how many attempts it took."""

    value: Any
    error: str | None
    attempts: int


Start = Callable[..., "Future[Outcome]"]


@contextlib.contextmanager
def caller(limits: CallLimits) -> Iterator[Start]:
    """Gives `start(function, *arguments) -> Future[Outcome]`, whose futures never raise for what the function did.

    A plain function runs in a thread of its own. One that hangs cannot be stopped: its thread is left behind, and as a
    daemon does not keep the process from ending. An async function is cancelled, and left behind if it does not heed
    that. Async functions have an event loop and a thread to themselves: one that blocks them costs the others their
    time, but every call still comes back. On leaving, what still runs is cancelled or left behind in the same way.
    """
    limits.check()
    loop, thread = _start_loop("environment calls")
    async_loop, async_thread = _start_loop("async environment calls")
    free = asyncio.Semaphore(limits.in_flight)

    async def attempt(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        async with asyncio.timeout(limits.timeout):
            if inspect.iscoroutinefunction(inspect.unwrap(function)):
                # a future of another loop: when the time is over, nobody waits for what it does about its cancellation
                return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(function(*arguments), async_loop))
            return await in_thread(function, *arguments)

    async def call(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Outcome:
        attempts = 0
        retrying = tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(limits.retries + 1),
            wait=tenacity.wait_exponential(multiplier=limits.backoff, max=60),
            retry=tenacity.retry_if_exception_type(Exception),
            reraise=True,
        )
        async with free:
            try:
                async for turn in retrying:
                    with turn:
                        attempts += 1
                        return Outcome(await attempt(function, arguments), None, attempts)
            except TimeoutError as error:
                # an environment may raise TimeoutError itself, and then says more than nothing
                return Outcome(None, str(error) or f"no answer within {limits.timeout} seconds", attempts)
            except Exception as error:
                return Outcome(None, f"{type(error).__name__}: {error}", attempts)
        raise AssertionError("tenacity ended without a value or an error")

    def start(function: Callable[..., Any], *arguments: Any) -> Future[Outcome]:
        return asyncio.run_coroutine_threadsafe(call(function, arguments), loop)

    try:
        yield start
    finally:
        _stop_loop(loop, thread)
        _stop_loop(async_loop, async_thread)


def _start_loop(name: str) -> tuple[asyncio.AbstractEventLoop, threading.Thread]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name=name, daemon=True)
    thread.start()
    return loop, thread


def _stop_loop(loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    """Cancels what runs in it and gives it a moment to end. A function that blocks the loop keeps loop and thread."""

    async def end() -> None:
        pending = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in pending:
            if not task.cancelling():  # it may be cleaning up
                task.cancel()
        await asyncio.wait(pending, timeout=CLEAN_UP_SECONDS) if pending else None
        loop.stop()

    loop.call_soon_threadsafe(lambda: asyncio.ensure_future(end()))
    thread.join(2 * CLEAN_UP_SECONDS)
    if not thread.is_alive():
        loop.close()


async def in_thread(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a function that runs in a daemon thread of its own.

    `asyncio.to_thread` shares a pool, which a few calls that hang would fill for ever, and which the interpreter waits
    for when it ends.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Any] = loop.create_future()

    def settle(setter: Callable[[Any], None], value: Any) -> None:
        if not done.done():  # too late: the time is over
            setter(value)

    def run() -> None:
        try:
            report = (done.set_result, function(*arguments))
        except BaseException as error:  # whatever it is, it belongs to the call and not to this thread
            report = (done.set_exception, error if isinstance(error, Exception) else RuntimeError(repr(error)))
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(settle, *report)

    threading.Thread(target=run, daemon=True).start()
    return await done
