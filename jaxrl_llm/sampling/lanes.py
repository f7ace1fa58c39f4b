"""What a `Session` runs on the device: decode steps over a cache in pages, the computation of known tokens, copies of
pages. Rows come as lanes, arrays that the host fills anew for each call."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from jaxrl_llm.models.decoder import Cache, Model, with_page_table, without_page_table
from jaxrl_llm.sampling.constraints import Constraint
from jaxrl_llm.sampling.slots import Limits, Slots, Stops, Written, decode
from jaxrl_llm.types import Decoding, Params


class Lanes(NamedTuple):
    """What the device is told of the rows that it takes on."""

    tokens: Int[Array, "S T"]
    keys: UInt32[Array, "S W"]
    known: Int[Array, "S"]
    fed: Int[Array, "S"]
    turn_start: Int[Array, "S"]
    states: Int[Array, "S"]  # of the constraint now, and where a turn begins
    start_states: Int[Array, "S"]
    active: Bool[Array, "S"]
    page_table: Int[Array, "S M"]


class Moved(NamedTuple):
    """What the device says of them."""

    tokens: Int[Array, "S steps"]
    logprobs: Float[Array, "S steps"]
    free_logprobs: Float[Array, "S steps"] | None
    known: Int[Array, "S"]
    fed: Int[Array, "S"]
    over: Bool[Array, "S"]
    states: Int[Array, "S"] | None


@functools.partial(
    jax.jit,
    static_argnames=("model", "decoding", "stops", "limits", "steps", "key_impl"),
    donate_argnames="pages",
)
def advance_lanes(
    params: Params,
    pages: Cache,
    lanes: Lanes,
    constraint: Constraint | None,
    *,
    model: Model,
    decoding: Decoding,
    stops: Stops,
    limits: Limits,
    steps: int,
    key_impl: str,
) -> tuple[Moved, Cache]:
    """Up to `steps` decode steps, fewer once an eighth of the active lanes has ended its turn; what was drawn, and the
    pages with what was computed."""
    num, length = lanes.tokens.shape
    places = jnp.arange(num)
    keys = jax.random.wrap_key_data(lanes.keys, impl=key_impl)
    written = Written(
        tokens=lanes.tokens,
        mask=jnp.zeros((num, length), bool),
        logprobs=jnp.zeros((num, length), jnp.float32),
        turn_ids=jnp.zeros((num, length), jnp.int32),
        lengths=lanes.known,
        turn_rewards=jnp.zeros((num, 1)),
        turn_mask=jnp.zeros((num, 1), bool),
        truncated=jnp.zeros(num, bool),
        free_logprobs=None if constraint is None else jnp.zeros((num, length), jnp.float32),
    )
    slots = Slots(
        row=jnp.where(lanes.active, places, num),
        known=lanes.known,
        fed=lanes.fed,
        turn=jnp.zeros(num, jnp.int32),
        turn_start=lanes.turn_start,
        waiting=jnp.zeros(num, bool),
        env_state=(),
        cache=with_page_table(pages, lanes.page_table),
        states=None if constraint is None else lanes.states,
    )
    row_states = None if constraint is None else lanes.start_states
    enough = jnp.maximum(1, jnp.sum(lanes.active) // 8)

    def unfinished(carry):
        done, (_, slots) = carry
        left = jnp.any(lanes.active & ~slots.waiting)
        return (done < steps) & left & (jnp.sum(slots.waiting) < enough)

    def step(carry):
        done, (written, slots) = carry
        fixed = (model, params, keys, decoding, stops, limits)
        return done + 1, decode(*fixed, 1, written, slots, constraint, row_states)

    _, (written, slots) = jax.lax.while_loop(unfinished, step, (0, (written, slots)))
    columns = lanes.known[:, None] + jnp.arange(steps)

    def drawn(array):
        return array.at[places[:, None], columns].get(mode="fill", fill_value=0)

    moved = Moved(
        tokens=drawn(written.tokens),
        logprobs=drawn(written.logprobs),
        free_logprobs=jax.tree.map(drawn, written.free_logprobs),  # None without a constraint
        known=slots.known,
        fed=slots.fed,
        over=slots.waiting,
        states=slots.states,
    )
    return moved, without_page_table(slots.cache)


@functools.partial(jax.jit, static_argnames="model", donate_argnames="pages")
def compute_lanes(
    params: Params,
    pages: Cache,
    tokens: Int[Array, "R L"],
    starts: Int[Array, "R"],
    lengths: Int[Array, "R"],
    page_table: Int[Array, "R M"],
    *,
    model: Model,
) -> Cache:
    """Keys and values of `lengths` tokens of each row, written behind the `starts` that are there."""
    """The pages with keys and values of known tokens, `lengths` of them from `starts` on in each row."""
    steps = jnp.arange(tokens.shape[1])
    positions = jnp.where(steps < lengths[:, None], starts[:, None] + steps, -1)
    _, cache = model.apply(params, tokens, positions=positions, cache=with_page_table(pages, page_table))
    return without_page_table(cache)


@functools.partial(jax.jit, donate_argnums=0)
def copy_pages(pages: Cache, sources: Int[Array, "N"], copies: Int[Array, "N"]) -> Cache:
    """The pages with `copies` overwritten by `sources`; a copy to a page behind the end is dropped."""
    # in bounds or not: a copy to a page behind the end is dropped, whatever was read for it
    return jax.tree.map(lambda x: x.at[copies].set(x[jnp.minimum(sources, x.shape[0] - 1)], mode="drop"), pages)
