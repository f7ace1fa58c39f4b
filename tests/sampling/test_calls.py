"""Functions that do not heed their time: each call comes back all the same, and so does whoever leaves."""

import asyncio
import threading
import time

import pytest

from jaxrl_llm.sampling.calls import CallLimits, caller

LIMITS = CallLimits(timeout=0.3, retries=0, backoff=0.0)
TOO_LATE = "no answer within 0.3 seconds"


async def deaf(ended):
    """Cancelled, it goes on as if nothing were."""
    while not ended.is_set():
        try:
            await asyncio.sleep(0.02)
        except asyncio.CancelledError:
            continue


async def blocking(ended):
    """Keeps the event loop to itself."""
    ended.wait(60)


def hanging(ended):
    ended.wait(60)


async def quick():
    return 7


@pytest.mark.parametrize("stubborn", [deaf, blocking, hanging])
def test_what_never_returns_stops_nothing(stubborn):
    ended = threading.Event()
    begun = time.monotonic()
    with caller(LIMITS) as start:
        late = [start(stubborn, ended) for _ in range(2)]
        plain = start(lambda: 5)
        assert plain.result(20).value == 5
        assert [future.result(20).error for future in late] == [TOO_LATE] * 2
        # an event loop that is blocked cannot serve others, but they are told so when their time is over
        outcome = start(quick).result(20)
        assert outcome.error == TOO_LATE if stubborn is blocking else outcome.value == 7
        start(stubborn, ended)
    assert time.monotonic() - begun < 20
    ended.set()


def test_an_async_function_is_cancelled_and_may_clean_up():
    cleaned = threading.Event()

    async def careful():
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.01)
            cleaned.set()

    with caller(LIMITS._replace(timeout=None)) as start:
        future = start(careful)
        assert start(quick).result(20).value == 7
    assert cleaned.is_set() and future.cancelled()
