"""Rows that are decoded on the device and directed from the host: begun, answered, forked, ended at any time.

The device holds one thing, a cache in pages. Everything else about a row is on the host (`rows.Row`), and a call of
`advance` takes as many rows as there are slots through some decode steps. So a row that waits for a tool takes no slot,
rows with a common beginning share its pages, and a row whose pages were needed elsewhere is computed again from its
tokens when its time comes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from jaxrl_kernels.mesh import current_mesh, mesh_axes
from jaxrl_llm.models.decoder import Model, init_pages
from jaxrl_llm.sampling.constraints import Constraint, next_states, start_states
from jaxrl_llm.sampling.lanes import Lanes, Moved, advance_lanes, compute_lanes, copy_pages
from jaxrl_llm.sampling.pages import PagePool
from jaxrl_llm.sampling.rows import Row, forked_row, new_row
from jaxrl_llm.sampling.slots import Limits, check_sizes, check_stops
from jaxrl_llm.types import Decoding, Params

PREFILL = 16  # so many known tokens are computed side by side; fewer go through decode steps one by one
NO_LIMIT = 2**30

_next_states = jax.jit(next_states)


class Session:
    """A cache in pages and the rows that live in it.

        session = Session(model, key, max_length=512, max_turn_tokens=128, stop_sequences=[[eos]])
        row = session.add(prompt_ids)
        while row not in session.advance(params): pass          # rows whose turn is over wait for an observation
        session.observe(row, observation_ids)                    # the next turn begins
        children = session.fork(row, position=40, count=4)       # share the first 40 tokens and their pages
        session.finish(row)

    A token depends on (key, the row's number or its place among the forks, position) alone: neither on other rows nor
    on the number of slots.

    Made under `jax.set_mesh`, it divides heads, experts and the vocabulary. Pages, which any row may read, are whole
    along the axes that divide rows: `rollout` divides rows, as would a session on each part of the devices.

    Args:
      model: the policy.
      key: consumed.
      max_length: T, tokens of a row. max_turn_tokens: a turn ends there even without a stop sequence; None: only T.
      stop_sequences: token sequences of which the last token ends a turn.
      decoding: how tokens are drawn.
      constraint: what may be drawn, None for everything.
      num_slots: rows decoded side by side.
      page_size: places of a page. Smaller ones share more, larger ones are read faster; a TPU wants multiples of 128.
      num_rows: full rows that there are pages for, by default twice as many as slots. With more rows under way, those
        that were longest without a slot are computed again.
      num_pages: in all, in place of what `num_rows` take.
      cache_dtype: of keys and values.

    Raises:
      ValueError: a size is not positive, a stop sequence is empty, `num_pages` cannot hold one full row, or the heads
        do not divide among the devices of the mesh.
    """

    def __init__(
        self,
        model: Model,
        key: jax.Array,
        *,
        max_length: int,
        max_turn_tokens: int | None = None,
        stop_sequences: Sequence[Sequence[int]] = (),
        decoding: Decoding = Decoding(),
        constraint: Constraint | None = None,
        num_slots: int = 64,
        page_size: int | None = None,
        num_rows: int | None = None,
        num_pages: int | None = None,
        cache_dtype: DTypeLike = jnp.float32,
    ) -> None:
        if page_size is None:
            page_size = 128 if jax.default_backend() == "tpu" else 32
        self.model, self.decoding, self.constraint = model, decoding, constraint
        self.limits = Limits(max_length, NO_LIMIT, NO_LIMIT if max_turn_tokens is None else max_turn_tokens)
        self.stops, self.num_slots, self.page_size = check_stops(stop_sequences), num_slots, page_size
        check_sizes(max_length=max_length, num_slots=num_slots, page_size=page_size, max_turn_tokens=self.limits[2])
        # an adapter may keep places before the first token for itself
        self._offset = jax.eval_shape(lambda: model.init_cache(1, 1))[0]["values"].shape[-2] - 1
        self._table_width = self._pages_for(max_length)
        num_rows = 2 * num_slots if num_rows is None else num_rows
        num_pages = num_rows * self._table_width if num_pages is None else num_pages
        if num_pages < self._table_width:
            raise ValueError(
                f"num_pages={num_pages} of {page_size} places cannot hold a row of {max_length} tokens; "
                f"give at least {self._table_width}"
            )
        self.pool = PagePool(num_pages)
        self._pages = init_pages(model, num_pages, page_size, jnp.dtype(cache_dtype))
        heads = mesh_axes("heads", model.config.num_kv_heads)
        if current_mesh() is not None:  # laid out as calls give them back, so that there is one program for a shape
            parts = PartitionSpec() if heads is None else PartitionSpec(None, *heads)
            self._pages = jax.device_put(self._pages, NamedSharding(jax.sharding.get_mesh(), parts))
        self._key, self._key_impl = key, str(jax.random.key_impl(key))
        self._live: dict[Row, None] = {}  # ready rows, in the order in which they get slots
        self._holding: dict[Row, None] = {}  # rows with pages, the longest unused first
        self._added = 0

    def add(
        self,
        tokens: Sequence[int],
        *,
        number: int | None = None,
        share: Row | None = None,
        group: int = 0,
    ) -> Row:
        """A row with the prompt `tokens`, ready to decode.

        Args:
          number: what its randomness is folded from; by default rows are counted.
          share: a row that may begin alike; pages of it are shared as far as it does.
          group: which of a constraint's `choices` hold for the row.

        Raises:
          ValueError: no tokens, or they leave no room for one more.
        """
        if not 0 < len(tokens) < self.limits.max_length:
            raise ValueError(
                f"a prompt of {len(tokens)} tokens: expected 1 to {self.limits.max_length - 1}, as a row holds "
                f"max_length={self.limits.max_length} and the policy needs room"
            )
        key = jax.random.fold_in(self._key, self._added if number is None else number)
        self._added += 1
        start = -1 if self.constraint is None else int(start_states(self.constraint, jnp.array([group]))[0])
        row = new_row(tokens, np.asarray(jax.random.key_data(key)), self.limits.max_length, start)
        if share is not None:
            alike = row.tokens[: min(row.known, share.known)] == share.tokens[: min(row.known, share.known)]
            self._share_pages(share, [row], len(alike) if np.all(alike) else int(np.argmin(alike)))
        self._live[row] = None
        return row

    def fork(self, row: Row, position: int, count: int = 1) -> list[Row]:
        """`count` rows that begin with the first `position` tokens of `row`, live or finished, and share their pages.

        Inside a turn the children go on with it; right behind one that was over they wait for an observation, as `row`
        did. What `row` does later changes nothing for them.

        Raises:
          ValueError: `position` is not among the row's tokens, or leaves no room for one more.
        """
        if not 0 < position <= min(row.known, self.limits.max_length - 1):
            raise ValueError(
                f"position={position}: expected 1 to {min(row.known, self.limits.max_length - 1)}, tokens of the row"
            )
        parent_key = jax.random.fold_in(jax.random.wrap_key_data(jnp.asarray(row.key), impl=self._key_impl), position)
        keys = jax.vmap(lambda child: jax.random.fold_in(parent_key, child))(row.forks + jnp.arange(count))
        row.forks += count
        children = [forked_row(row, position, key) for key in np.asarray(jax.random.key_data(keys))]
        self._share_pages(row, children, position)
        for child in children:
            child.state = self._state_of(child)
            if self._turn_is_over(child):
                child.turn_ends.append(position)
                child.status = "waiting"
            else:
                self._live[child] = None
        return children

    def prefill(self, params: Params, rows: Iterable[Row]) -> None:
        """Computes keys and values of all that is known of `rows`, as far as there are pages, so that what is added or
        forked from them shares it. Rows that are left out are computed when they get a slot."""
        rows = list(rows)
        self._compute(params, [row for row in rows if self._reserve(row, row.known, keep=rows)])

    def advance(self, params: Params, *, version: int = 0, steps: int = 8) -> list[Row]:
        """Takes the next ready rows through up to `steps` decode steps; fewer once an eighth of them has ended a turn.

        Args:
          params: of the policy; they may be others than in the last call. Keys and values that are in the cache stay.
          version: written down for each token that is drawn.

        Returns:
          rows whose turn is over, now waiting for `observe` or `finish`.

        Raises:
          FloatingPointError: logits of a row are not finite.
        """
        rows: list[Row] = []
        for row in self._live:
            if len(rows) == self.num_slots or not self._reserve(row, row.known + steps, keep=[*rows, row]):
                break
            rows.append(row)
        if not rows:
            return []
        self._compute(params, [row for row in rows if row.known - row.computed > PREFILL])
        lanes = self._lanes(rows)
        moved, self._pages = advance_lanes(
            params, self._pages, lanes, self.constraint, model=self.model, decoding=self.decoding, stops=self.stops,
            limits=self.limits, steps=steps, key_impl=self._key_impl,
        )  # fmt: skip
        moved = jax.device_get(moved)
        for lane, row in enumerate(rows):
            self._write(row, moved, lane, version)
        ended = [row for lane, row in enumerate(rows) if moved.over[lane]]
        for row in ended:
            del self._live[row]
            row.status = "waiting"
            row.turn_ends.append(row.known)
        return ended

    def observe(self, row: Row, tokens: Sequence[int], reward: float = 0.0) -> None:
        """Appends an observation to a waiting row, and pays for its turn; the next turn begins.

        Raises:
          ValueError: the row does not wait, or the observation leaves no room for a token behind it.
        """
        if len(tokens) >= self.room(row):
            raise ValueError(
                f"an observation of {len(tokens)} tokens; {self.room(row) - 1} leave room for one more. Shorten it "
                "or finish the row"
            )
        self._settle(row, reward)
        row.tokens[row.known : row.known + len(tokens)] = tokens
        row.known += len(tokens)
        row.turn_starts.append(row.known)
        row.status, row.state = "ready", row.start_state
        self._live[row] = None

    def finish(self, row: Row, reward: float | None = None, *, truncated: bool = False) -> None:
        """Ends a row, with a last reward if it waits. Its pages stay for forks until they are needed or given back with
        `release`."""
        if reward is not None:
            self._settle(row, reward)
        row.status, row.truncated = "finished", truncated
        self._live.pop(row, None)

    def release(self, row: Row) -> None:
        """Gives the pages of a row back; should it go on or be forked, it is computed again."""
        self.pool.give_back(row.pages)
        row.pages, row.computed = [], 0
        self._holding.pop(row, None)

    def room(self, row: Row) -> int:
        """Tokens that a row may still take."""
        return self.limits.max_length - row.known

    @property
    def idle(self) -> bool:
        """Whether no row is ready to decode."""
        return not self._live

    def _settle(self, row: Row, reward: float) -> None:
        if row.status != "waiting":
            raise ValueError(
                f"the row is {row.status}, expected one that waits: advance it to the end of its turn first"
            )
        row.turn_rewards.append(float(reward))

    def _pages_for(self, places: int) -> int:
        return -(-(places + self._offset) // self.page_size)

    def _state_of(self, row: Row) -> int:
        """Of the constraint, behind the tokens of the row's last turn."""
        state = jnp.array([row.start_state])
        for token in row.turn_tokens if self.constraint is not None else ():
            state = _next_states(self.constraint, state, jnp.array([token]))
        return int(state[0])

    def _turn_is_over(self, row: Row) -> bool:
        """As in `slots.decode`."""
        turn = row.turn_tokens.tolist()
        stopped = any(len(turn) >= len(stop) and turn[-len(stop) :] == list(stop) for stop in self.stops)
        return stopped or len(turn) >= self.limits.max_turn_tokens

    def _share_pages(self, row: Row, children: list[Row], length: int) -> None:
        """Gives the children the row's pages with the first `length` tokens, and each a copy of the one that is cut."""
        computed = min(row.computed, length)
        if not computed:
            return
        whole, rest = divmod(computed + self._offset, self.page_size)
        sources, copies = [], []
        for child in children:
            child.pages = row.pages[:whole]
            self.pool.share(child.pages)
            child.computed = max(whole * self.page_size - self._offset, 0)
            self._holding[child] = None
            if rest and self._reserve(child, computed, keep=[row, *children]):
                child.computed = computed
                sources.append(row.pages[whole])
                copies.append(child.pages[whole])
        if copies:
            padding = [len(self.pool.holders)] * (_bucket(len(copies), 4, 4) - len(copies))  # behind the end: dropped
            self._pages = copy_pages(self._pages, np.array(sources + padding), np.array(copies + padding))

    def _reserve(self, row: Row, length: int, keep: Iterable[Row]) -> bool:
        """Gives a row the pages for its first `length` tokens, if need be those of rows that are not in `keep`."""
        needed = self._pages_for(min(length, self.limits.max_length))
        kept = None
        while len(row.pages) < needed:
            page = self.pool.take()
            if page is None:
                kept = {id(row), *map(id, keep)} if kept is None else kept
                victim = min(
                    (other for other in self._holding if id(other) not in kept),
                    key=lambda other: ("finished", "waiting", "ready").index(other.status),
                    default=None,
                )
                if victim is None:
                    return False
                self.release(victim)
            else:
                row.pages.append(page)
        self._holding.pop(row, None)
        self._holding[row] = None
        return True

    def _compute(self, params: Params, rows: list[Row]) -> None:
        """Keys and values of all known tokens of `rows`, side by side where their lengths are alike."""
        rows = sorted((row for row in rows if row.computed < row.known), key=lambda row: row.known - row.computed)
        for first in range(0, len(rows), self.num_slots):
            batch = rows[first : first + self.num_slots]
            width = _bucket(batch[-1].known - batch[-1].computed, PREFILL)
            table_width = min(_bucket(max(len(row.pages) for row in batch), 8, 4), self._table_width)
            padded = _bucket(len(batch), factor=4)
            tokens, starts = np.zeros((padded, width), np.int32), np.zeros(padded, np.int32)
            lengths = np.zeros(padded, np.int32)
            for lane, row in enumerate(batch):
                new = row.tokens[row.computed : row.known]
                tokens[lane, : len(new)], starts[lane], lengths[lane] = new, row.computed, len(new)
                row.computed = row.known
            table = self._table(batch, padded)[:, :table_width]
            self._pages = compute_lanes(params, self._pages, tokens, starts, lengths, table, model=self.model)

    def _table(self, rows: list[Row], num_lanes: int) -> np.ndarray:
        table = np.full((num_lanes, self._table_width), len(self.pool.holders), np.int32)  # behind the end: not written
        for lane, row in enumerate(rows):
            table[lane, : len(row.pages)] = row.pages
        return table

    def _lanes(self, rows: list[Row]) -> Lanes:
        def column(values: list[int], rest: int) -> np.ndarray:
            return np.array(values + [rest] * (self.num_slots - len(rows)), np.int32)

        tokens = np.zeros((self.num_slots, self.limits.max_length), np.int32)
        keys = np.zeros((self.num_slots, *rows[0].key.shape), np.uint32)
        for lane, row in enumerate(rows):
            tokens[lane], keys[lane] = row.tokens, row.key
        lanes = dict(
            tokens=tokens,
            keys=keys,
            known=column([row.known for row in rows], 0),
            # the last known token is fed again where it was computed, for its logits
            fed=column([min(row.computed, row.known - 1) for row in rows], 0),
            turn_start=column([row.turn_starts[-1] for row in rows], 0),
            states=column([row.state for row in rows], -1),
            start_states=column([row.start_state for row in rows], -1),
            active=np.arange(self.num_slots) < len(rows),
            page_table=self._table(rows, self.num_slots),
        )
        return Lanes(**{name: jnp.asarray(array) for name, array in lanes.items()})

    def _write(self, row: Row, moved: Moved, lane: int, version: int) -> None:
        """Writes down what a row has drawn."""
        new = slice(row.known, int(moved.known[lane]))
        count = new.stop - new.start
        row.tokens[new], row.mask[new] = moved.tokens[lane, :count], True
        row.logprobs[new], row.versions[new] = moved.logprobs[lane, :count], version
        if moved.free_logprobs is not None and moved.states is not None:
            row.free_logprobs[new], row.state = moved.free_logprobs[lane, :count], int(moved.states[lane])
        row.known, row.computed = new.stop, int(moved.fed[lane])
        if count and not np.all(np.isfinite(row.logprobs[new])):
            raise FloatingPointError(
                f"logits behind token {new.start} of a row are not finite; look at the parameters (version {version})"
            )


def _bucket(size: int, least: int = 1, factor: int = 2) -> int:
    """The next of few sizes (`least` times a power of `factor`), so that few shapes are compiled."""
    while least < size:
        least *= factor
    return least
