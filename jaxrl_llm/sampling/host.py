"""Multi-turn rollouts against an environment in Python: the device decodes on while its calls run.

The same slots as in `sampling.device`, advanced some steps at a time. In between, the host

    hands the turns that have ended to the environment, each call in the background
    appends the observations of the calls that have come back
    and only waits where every slot waits
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.models.decoder import Model
from jaxrl_llm.models.tokenizer import Tokenizer
from jaxrl_llm.sampling.calls import CallLimits, Outcome, Start, caller
from jaxrl_llm.sampling.slots import (
    Limits,
    Prompts,
    Slots,
    Stops,
    Written,
    answer,
    check_prompts,
    check_sizes,
    check_stops,
    decode,
    finish,
    prefill,
    refill,
    start,
    turn_of,
)
from jaxrl_llm.types import Decoding, Params, Rollout

CALL_LIMITS = CallLimits()
PROMPT_STEP = 32  # prompts are padded to a multiple, so that few lengths are compiled


@dataclasses.dataclass
class Episode:
    """What the environment's side of a row was like.

    Attributes:
      calls: attempts, retries included.
      errors: the errors that the policy was shown, one for each call that failed for good.
      cut_tokens: tokens of observations that were left out because they were too long.
      stopped: the limit that ended the row before the environment did: "turns", "tokens" (an observation left no room),
        "calls" or "seconds"; None otherwise. Such rows are `truncated` in the rollout.
    """

    calls: int = 0
    errors: list[str] = dataclasses.field(default_factory=list)
    cut_tokens: int = 0
    stopped: Literal["turns", "tokens", "calls", "seconds"] | None = None


class _Turns(NamedTuple):
    """What the host sees of the slots."""

    row: Any  # [S]
    turn: Any  # [S]
    known: Any  # [S], tokens of the row
    waiting: Any  # [S]
    tokens: Any  # [S, L] of the turn that a waiting slot has ended
    lengths: Any  # [S]
    active: Any  # whether any slot has something to decode


class _Reply(NamedTuple):
    """What a slot's row is given: an observation, a reward, whether the episode is over, and what else ended it."""

    observation: list[int]
    reward: float
    done: bool
    stopped: Literal["turns", "tokens", "calls", "seconds"] | None


def host_rollout(
    model: Model,
    params: Params,
    env: Any,
    tasks: Sequence[Any],
    key: jax.Array,
    *,
    tokenizer: Tokenizer,
    max_length: int,
    max_turns: int,
    max_turn_tokens: int,
    stop_sequences: Sequence[Sequence[int]] = (),
    decoding: Decoding = Decoding(),
    group_size: int = 1,
    num_slots: int = 64,
    steps: int = 8,
    call_limits: CallLimits = CALL_LIMITS,
    max_observation: int = 512,
    max_calls: int | None = None,
    max_seconds: float | None = None,
    render_error: Callable[[str], str] = "\nError: {}\n".format,
) -> tuple[Rollout, list[Episode]]:
    """Plays `group_size` episodes of every task, as `rollout` does, against an environment on strings.

    The tokens are those that `rollout` samples with the same key against a device environment with the same answers.
    What the policy said is never encoded again, and an observation is encoded once: the loss sees the ids that were
    sampled and the ids that were forced. Every row that was begun is returned; one that a limit ended is marked.

    Args:
      model, params: the policy.
      env: `reset(task) -> (state, prompt)` and `step(state, turn_text) -> (state, observation, reward, done)`, plain
        (then called from several threads at a time) or async. See `envs.HostEnv`.
      tasks: one per prompt.
      key: consumed.
      tokenizer: of the policy, for prompts, turns and observations.
      max_length, max_turns, max_turn_tokens, stop_sequences, decoding, group_size, num_slots: as in `rollout`.
      steps: decode steps between two looks at the calls. Fewer answer sooner, more cost less.
      call_limits: time-outs, retries and how many calls run at a time. A call that fails for good becomes an
        observation of `render_error(message)` with reward 0, and its episode goes on in the state it was in.
      max_observation: tokens of an observation; of a longer one the middle is left out.
      max_calls: attempts per row, retries included. The row ends with the call that reaches them.
      max_seconds: wall-clock time per row, from when it gets a slot. It ends a row that waits, not one that decodes.
      render_error: the text that the policy sees.

    Returns:
      The rollout, and an `Episode` for each of its rows.

    Raises:
      ValueError: no tasks, a size that is not positive, prompts that leave no room in `max_length`, or an answer of the
        environment that is not (state, text, number, bool).
      RuntimeError: `env.reset` failed for a task.
    """
    check_sizes(
        num_tasks=len(tasks),
        max_turns=max_turns,
        max_turn_tokens=max_turn_tokens,
        group_size=group_size,
        num_slots=num_slots,
        steps=steps,
        max_observation=max_observation,
    )
    num_rows, num_slots = len(tasks) * group_size, min(num_slots, len(tasks) * group_size)
    limits = Limits(max_length, max_turns, max_turn_tokens)
    _, token_key = jax.random.split(key)  # as in `rollout`, where the first half is the environment's
    episodes = [Episode() for _ in range(num_rows)]
    begin, advance, respond, end = _programs(
        model, limits, check_stops(stop_sequences), decoding, group_size, num_slots, steps
    )
    started = [0.0] * num_rows
    with caller(call_limits) as begin_call:
        states, prompt_texts = _reset(env, tasks, begin_call)
        row_states = [states[row // group_size] for row in range(num_rows)]
        tokens, lengths = _padded(tokenizer.encode_batch(prompt_texts), max_length)
        prompts, *carry = begin(params, tokens, lengths)
        calls: dict[int, Future[Outcome]] = {}  # by slot
        while True:
            *carry, turns = advance(params, prompts, token_key, *carry)
            turns = jax.device_get(turns)
            for slot in np.flatnonzero(turns.row < num_rows).tolist():
                row = int(turns.row[slot])
                started[row] = started[row] or time.monotonic()
                if turns.waiting[slot] and slot not in calls:
                    text = tokenizer.decode(turns.tokens[slot, : turns.lengths[slot]])
                    calls[slot] = begin_call(env.step, row_states[row], text)
            if not calls and not turns.active:
                return end(carry[0], prompts), episodes
            deadlines = {slot: started[int(turns.row[slot])] + (max_seconds or math.inf) for slot in calls}
            replies = {}
            for slot, outcome in _collect(calls, deadlines, wait=not turns.active).items():
                row = int(turns.row[slot])
                last = turns.turn[slot] + 1 == max_turns
                reply, row_states[row] = _reply(outcome, row_states[row], episodes[row], tokenizer, render_error)
                room = max_length - int(turns.known[slot])
                replies[slot] = _limited(reply, outcome, episodes[row], bool(last), room, max_observation, max_calls)
                episodes[row].stopped = replies[slot].stopped
            carry[:2] = respond(*carry[:2], *_arrays(replies, num_slots, max_observation, max_length))


def _reset(env: Any, tasks: Sequence[Any], begin_call: Start) -> tuple[list[Any], list[str]]:
    """State and prompt of every task."""
    outcomes = [future.result() for future in [begin_call(env.reset, task) for task in tasks]]
    for index, outcome in enumerate(outcomes):
        if outcome.error is not None:
            raise RuntimeError(f"env.reset failed for task {index} after {outcome.attempts} attempts: {outcome.error}")
        if not isinstance(outcome.value, tuple) or len(outcome.value) != 2 or not isinstance(outcome.value[1], str):
            raise ValueError(f"env.reset must return (state, prompt text), got {outcome.value!r:.200} for task {index}")
    return [outcome.value[0] for outcome in outcomes], [outcome.value[1] for outcome in outcomes]


def _padded(prompts: list[list[int]], max_length: int) -> tuple[np.ndarray, np.ndarray]:
    longest = max(map(len, prompts))
    check_prompts(longest, max_length)
    if min(map(len, prompts)) == 0:
        raise ValueError("env.reset returned a prompt without tokens: the first token has nothing to be sampled from")
    tokens = np.zeros((len(prompts), min(-(-longest // PROMPT_STEP) * PROMPT_STEP, max_length - 1)), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return tokens, np.array([len(prompt) for prompt in prompts], np.int32)


def _collect(
    calls: dict[int, Future[Outcome]], deadlines: dict[int, float], *, wait: bool
) -> dict[int, Outcome | None]:
    """Takes out the calls that have come back; None for those whose row has run out of time. With `wait`, not before
    there is one."""
    now = time.monotonic()
    if wait and calls:
        remaining = min(deadlines.values()) - now
        concurrent.futures.wait(
            calls.values(),
            timeout=None if math.isinf(remaining) else max(remaining, 0),
            return_when=concurrent.futures.FIRST_COMPLETED,
        )
        now = time.monotonic()
    found: dict[int, Outcome | None] = {}
    for slot, future in list(calls.items()):
        if future.done():
            found[slot] = future.result()
        elif now >= deadlines[slot]:
            future.cancel()
            found[slot] = None
        else:
            continue
        del calls[slot]
    return found


def _reply(
    outcome: Outcome | None, state: Any, episode: Episode, tokenizer: Tokenizer, render_error: Callable[[str], str]
) -> tuple[_Reply, Any]:
    """What the environment has answered, in tokens, and the episode's next state."""
    if outcome is None:
        return _Reply([], 0.0, False, "seconds"), state
    episode.calls += outcome.attempts
    if outcome.error is not None:
        episode.errors.append(outcome.error)
        return _Reply(tokenizer.encode(render_error(outcome.error)), 0.0, False, None), state
    value = outcome.value
    if not isinstance(value, tuple) or len(value) != 4 or not isinstance(value[1], str):
        raise ValueError(f"env.step must return (state, observation text, reward, done), got {value!r:.200}")
    state, observation, reward, done = value
    return _Reply(tokenizer.encode(observation), float(reward), bool(done), None), state


def _limited(
    reply: _Reply,
    outcome: Outcome | None,
    episode: Episode,
    last_turn: bool,
    room: int,
    max_observation: int,
    max_calls: int | None,
) -> _Reply:
    """The reply with its observation cut to size, and the limit that it meets, if any."""
    excess = len(reply.observation) - max_observation
    if excess > 0:  # the middle goes: a closing tag at the end means more than what stands before it
        head = max_observation - max_observation // 4
        kept = reply.observation[:head] + reply.observation[head + excess :]
        episode.cut_tokens += excess
        reply = reply._replace(observation=kept)
    if reply.done or reply.stopped is not None:
        return reply
    if max_calls is not None and episode.calls >= max_calls:
        return reply._replace(stopped="calls")
    if last_turn:
        return reply._replace(stopped="turns")
    return reply._replace(stopped="tokens") if len(reply.observation) >= room else reply


def _arrays(replies: dict[int, _Reply], num_slots: int, max_observation: int, max_length: int) -> tuple:
    """Arguments of `slots.answer`."""
    answered, done = np.zeros(num_slots, bool), np.zeros(num_slots, bool)
    observation, length = np.zeros((num_slots, max_observation), np.int32), np.zeros(num_slots, np.int32)
    reward = np.zeros(num_slots, np.float32)
    for slot, reply in replies.items():
        answered[slot], reward[slot], done[slot] = True, reply.reward, reply.done
        observation[slot, : len(reply.observation)] = reply.observation
        # an observation that fills the row ends it, marked
        length[slot] = len(reply.observation) if reply.stopped is None else max_length
    return answered, observation, length, reward, done


@functools.lru_cache(maxsize=32)
def _programs(
    model: Model,
    limits: Limits,
    stops: Stops,
    decoding: Decoding,
    group_size: int,
    num_slots: int,
    steps: int,
) -> tuple[Callable[..., Any], ...]:
    """The compiled parts of a rollout: its beginning, some decode steps, the answers of calls, its end."""

    @jax.jit
    def begin(params, tokens, lengths):
        prompts = Prompts(tokens, lengths, (), prefill(model, params, tokens, lengths, num_slots))
        return prompts, *start(model, prompts, limits, group_size, num_slots), jnp.int32(0)

    def active(slots: Slots, num_rows: int) -> jax.Array:
        return jnp.any((slots.row < num_rows) & ~slots.waiting)

    @functools.partial(jax.jit, donate_argnums=(3, 4))
    def advance(params, prompts, key, written, slots, next_row):
        slots, next_row = refill(prompts, group_size, slots, next_row)
        num_rows = written.tokens.shape[0]
        step = functools.partial(decode, model, params, key, decoding, stops, limits, 1)

        def unfinished(carry):
            done, (_, slots) = carry
            return (done < steps) & active(slots, num_rows)

        _, (written, slots) = jax.lax.while_loop(
            unfinished, lambda carry: (carry[0] + 1, step(*carry[1])), (0, (written, slots))
        )
        tokens, lengths = turn_of(written, slots, limits)
        turns = _Turns(slots.row, slots.turn, slots.known, slots.waiting, tokens, lengths, active(slots, num_rows))
        return written, slots, next_row, turns

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def respond(written: Written, slots: Slots, answered, observation, length, reward, done):
        return answer(written, slots, limits, answered, observation, length, reward, done)

    @jax.jit
    def end(written, prompts):
        return finish(written, prompts, group_size, decoding)

    return begin, advance, respond, end
