"""What a policy may write: token automata on the device.

A document id, one of some choices, JSON of a schema: each is an automaton whose states have edges, a token and the next
state, in the form of a sparse matrix (`[states, V]` never exists). A row carries its state from token to token:

    state >= 0      a state of the automaton: only the tokens of its edges may come next
    state < 0       free: every token but the banned ones

A constraint holds for a turn, from its first token or from where the policy has written the trigger, until an edge
leaves the automaton or the turn ends. What ends a turn is a stop sequence of the sampler, as ever: an end token of the
automaton that is none leaves the policy free to go on.

    trie = token_trie(document_ids, end=tokenizer.eos_ids)
    constraint = constrain(trie, vocab_size=model.config.vocab_size, trigger=tokenizer.encode("<document>"))
    sampled = rollout(model, params, env, tasks, key, constraint=constraint, ...)
    logprobs, entropy = score_rollout(model, params, sampled, decoding=sampled.decoding, constraint=constraint)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, UInt32

from jaxrl_kernels.sampling_search import smallest


class Automaton(NamedTuple):
    """The edges of an automaton over tokens, on the host, sorted by state and token. State 0 is where it begins; the
    target -1 leaves it."""

    sources: Int[np.ndarray, "E"]
    tokens: Int[np.ndarray, "E"]
    targets: Int[np.ndarray, "E"]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["offsets", "tokens", "targets", "first", "entered", "choices", "row_of", "rows"],
    meta_fields=["vocab_size", "max_degree", "trigger"],
)
@dataclasses.dataclass(frozen=True)
class Constraint:
    """One or more automata on the device; `constrain` makes it. The edges of state `n` are those from `offsets[n]` to
    `offsets[n + 1]`, sorted by token. The tokens of a state with more than `max_degree` edges are there as bits too,
    which take half the memory of its edges or less.

    A state below 0 says more than that a row is free: `-1 - (matched * R + automaton)` is one whose last `matched`
    tokens are the beginning of the trigger, and which goes on in that automaton once all of it is written.
    """

    offsets: Int[Array, "N+1"]
    tokens: Int[Array, "E"]
    targets: Int[Array, "E"]
    first: Int[Array, "R"]  # the state in which a turn begins, by automaton
    entered: Int[Array, "R"]  # the state behind the trigger
    choices: Int[Array, "P"] | None  # the automaton of each group; None: the first one for all
    row_of: Int[Array, "N"]  # where the bits of a state are; 1, none, where the edges are few enough
    rows: UInt32[Array, "M W"]  # allowed tokens, 32 to a word; the first row is that of a free state
    vocab_size: int
    max_degree: int
    trigger: tuple[int, ...]


def start_states(constraint: Constraint, group_ids: Int[Array, "S"]) -> Int[Array, "S"]:
    """The states in which a turn of rows of these groups begins."""
    if constraint.choices is None:
        return jnp.full(group_ids.shape, constraint.first[0])
    return constraint.first[constraint.choices[group_ids]]


def allowed_tokens(constraint: Constraint, states: Int[Array, "S"]) -> Bool[Array, "S V"]:
    """The tokens that may come next.

    A gather and a scatter of `S * max_degree` edges, `max_degree` at most `V / 16`, and a pass over `[S, V]`: with 64
    rows, 152,064 tokens and 100,000 document ids of 8 tokens less than the draw itself takes.
    """
    num_rows, vocab, degree = len(states), constraint.vocab_size, constraint.max_degree
    state = jnp.maximum(states, 0)
    words = constraint.rows[jnp.where(states >= 0, constraint.row_of[state], 0)]
    bits = (words[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    begin, end = constraint.offsets[state][:, None], constraint.offsets[state + 1][:, None]
    edge = begin + jnp.arange(degree)
    # What is no edge of the state goes to columns behind the vocabulary, each to its own: places are unique and sorted,
    # which makes the scatter many times faster.
    column = jnp.where(edge < end, constraint.tokens[edge], vocab + jnp.arange(degree))
    width = vocab + degree
    places = (jnp.arange(num_rows)[:, None] * width + column).reshape(-1)
    marked = jnp.zeros(num_rows * width, bool).at[places].set(True, unique_indices=True, indices_are_sorted=True)
    marked = marked.reshape(num_rows, width)[:, :vocab] & (states >= 0)[:, None]
    return marked | (bits.reshape(num_rows, -1)[:, :vocab] > 0)


def next_states(constraint: Constraint, states: Int[Array, "S"], tokens: Int[Array, "S"]) -> Int[Array, "S"]:
    """The states after a token each. A token that was not allowed leaves the row free."""
    state = jnp.maximum(states, 0)
    end = constraint.offsets[state + 1]
    edge = smallest(
        *(constraint.offsets[state], end, lambda place: constraint.tokens[place] >= tokens),
        constraint.vocab_size.bit_length(),
    )
    found = (edge < end) & (constraint.tokens[edge] == tokens)
    inside = jnp.where(found, constraint.targets[edge], -1)
    return jnp.where(states >= 0, inside, _free_states(constraint, states, tokens))


def _free_states(constraint: Constraint, states: Int[Array, "S"], tokens: Int[Array, "S"]) -> Int[Array, "S"]:
    """The next states of free rows: how much of the trigger is written, or what is entered behind it."""
    trigger, count = constraint.trigger, constraint.first.shape[0]
    if not trigger:
        return states
    matched, automaton = jnp.divmod(jnp.maximum(-1 - states, 0), count)
    written = jnp.zeros_like(states)
    for length in range(1, len(trigger) + 1):
        # `length` tokens are written now if, of the `matched` ones before, the last `length - 1` begin the trigger
        begins = jnp.array([trigger[: length - 1] == trigger[m - length + 1 : m] for m in range(len(trigger))])
        possible = begins & (jnp.arange(len(trigger)) >= length - 1)
        written = jnp.where(possible[matched] & (tokens == trigger[length - 1]), length, written)
    return jnp.where(written == len(trigger), constraint.entered[automaton], -1 - (written * count + automaton)).astype(
        states.dtype
    )


def token_trie(sequences: Iterable[Sequence[int]], *, end: Sequence[int] = ()) -> Automaton:
    """The automaton that writes one of some token sequences: document ids, choices.

    Args:
      sequences: of any lengths; duplicates count once.
      end: the tokens of which one closes a sequence, such as `tokenizer.eos_ids`. Without any, the policy is free again
        after the last token of a sequence, and no sequence may begin with another one.

    Raises:
      ValueError: no sequence, an empty one, a negative token, or it is left open where a sequence ends.
    """
    rows = [tuple(int(token) for token in sequence) for sequence in sequences]
    if not rows:
        raise ValueError("a trie needs at least one sequence, got none")
    for index, row in enumerate(rows):
        if not row or min(row) < 0:
            raise ValueError(f"sequence {index} of the trie must have tokens, all of them at least 0, got {list(row)}")
    rows = sorted(set(rows))
    table = np.full((len(rows), max(map(len, rows))), -1)
    for line, row in zip(table, rows, strict=True):
        line[: len(row)] = row
    # a cell begins a new prefix where it or one before it differs from the row above; prefixes are numbered from 1
    fresh = np.ones(table.shape, bool)
    fresh[1:] = np.logical_or.accumulate(table[1:] != table[:-1], axis=1)
    fresh &= table >= 0
    numbers = np.where(fresh, np.cumsum(fresh).reshape(table.shape), 0)
    states = np.maximum.accumulate(numbers, axis=0)
    parents = np.concatenate([np.zeros((len(rows), 1), states.dtype), states[:, :-1]], axis=1)
    sources, tokens, targets = parents[fresh], table[fresh], states[fresh]
    last = states[np.arange(len(rows)), [len(row) - 1 for row in rows]]
    return close_automaton(sources, tokens, targets, last, end)


def close_automaton(
    sources: Int[np.ndarray, "E"],
    tokens: Int[np.ndarray, "E"],
    targets: Int[np.ndarray, "E"],
    final: Int[np.ndarray, "F"],
    end: Sequence[int],
) -> Automaton:
    """An automaton that may be left at its final states: by an `end` token, or, without any, by reaching one.

    Raises:
      ValueError: without an `end` token a final state can also be gone on from, or with one it is not clear whether the
        token ends or goes on.
    """
    if end:
        sources = np.concatenate([sources, np.repeat(final, len(end))])
        tokens = np.concatenate([tokens, np.tile(np.asarray(end), len(final))])
        targets = np.concatenate([targets, np.full(len(final) * len(end), -1)])
    elif len(open_ends := np.intersect1d(final, sources)):
        raise ValueError(
            f"{len(open_ends)} of the ends can also be gone on from (a sequence begins with another one, or a pattern "
            "may repeat); give end tokens, such as end=tokenizer.eos_ids"
        )
    else:
        targets = np.where(np.isin(targets, final), -1, targets)
    order = np.lexsort((tokens, sources))
    automaton = Automaton(*(np.asarray(x)[order] for x in (sources, tokens, targets)))
    twice = (np.diff(automaton.sources) == 0) & (np.diff(automaton.tokens) == 0)
    if twice.any():
        token = automaton.tokens[np.argmax(twice)]
        raise ValueError(f"end token {token} also goes on from where it ends; end with one that no sequence has there")
    return automaton


def constrain(
    *automata: Automaton,
    vocab_size: int,
    choices: Sequence[int] | None = None,
    trigger: Sequence[int] = (),
    forced: Sequence[int] = (),
    banned: Sequence[int] = (),
) -> Constraint:
    """Puts automata, an opening and banned tokens on the device as one constraint of every turn.

    Sizes are rounded up to powers of two, so that the next batch's tries most often need no new compilation.

    Args:
      automata: what may be written. Several are for groups that differ, as the choices of each question do.
      vocab_size: V, the rows of the model's head (`model.config.vocab_size`).
      choices: [P], which of the automata holds for each task (for each of the rollout's `group_ids`). Needed if there
        are several.
      trigger: the tokens behind which the automaton holds. None: it holds from the beginning of a turn, behind
        `forced`.
      forced: the tokens that every turn begins with, as `<think>`. The policy draws them with probability 1: they are
        its tokens in the mask, with log-prob 0 and no gradient.
      banned: tokens that are never drawn, but as `forced` ones. Automata lose the ways that need them.

    Raises:
      ValueError: a token outside the vocabulary, an automaton that bans leave no way through, `choices` that do not fit
        the automata, a trigger without an automaton or that is banned, or nothing to constrain.
    """
    if not automata and (trigger or not (forced or banned)):
        raise ValueError(
            "a trigger needs an automaton" if trigger else "nothing to constrain: give an automaton, forced or banned"
        )
    named = {"trigger": trigger, "forced": forced, "banned": banned}
    for name, given in [*named.items(), *((f"automaton {i}", each.tokens) for i, each in enumerate(automata))]:
        outside = [token for token in np.asarray(given).tolist() if not 0 <= token < vocab_size]
        if outside:
            raise ValueError(f"{name}: token {outside[0]} is outside the vocabulary of {vocab_size} tokens")
    if len(np.unique(banned)) == vocab_size or set(trigger) & set(banned):
        raise ValueError("banned must leave some token, and every token of the trigger")
    count = max(1, len(automata))
    if choices is None and count > 1 or choices is not None and not set(np.unique(choices)) <= set(range(count)):
        raise ValueError(f"choices must give each task one of the {count} automata, 0 to {count - 1}, got {choices}")

    (sources, tokens, targets), first, entered = _joined(automata, trigger, forced, banned)
    offsets = np.searchsorted(sources, np.arange(_rounded(int(sources.max(initial=0)) + 2)))
    degrees = np.diff(offsets)
    heavy = np.flatnonzero(degrees > max(1, vocab_size // 32))
    row_of = np.ones(len(degrees), int)
    row_of[heavy] = 2 + np.arange(len(heavy))
    bits = np.zeros((_rounded(2 + len(heavy)), -(-vocab_size // 32) * 32), np.uint8)
    bits[0] = 1
    bits[0, np.asarray(banned, int)] = 0
    for state in heavy:
        bits[row_of[state], tokens[offsets[state] : offsets[state + 1]]] = 1
    room = _rounded(len(tokens)) - len(tokens)
    return Constraint(
        offsets=jnp.asarray(offsets, jnp.int32),
        tokens=jnp.asarray(np.pad(tokens, (0, room)), jnp.int32),
        targets=jnp.asarray(np.pad(targets, (0, room)), jnp.int32),
        first=jnp.asarray(first, jnp.int32),
        entered=jnp.asarray(entered, jnp.int32),
        choices=None if choices is None else jnp.asarray(choices, jnp.int32),
        row_of=jnp.asarray(row_of, jnp.int32),
        rows=jnp.asarray(np.packbits(bits, axis=1, bitorder="little").view("<u4")),
        vocab_size=vocab_size,
        max_degree=_rounded(int(np.delete(degrees, heavy).max(initial=1))),
        trigger=tuple(int(token) for token in trigger),
    )


def _joined(
    automata: Sequence[Automaton], trigger: Sequence[int], forced: Sequence[int], banned: Sequence[int]
) -> tuple[Automaton, list[int], list[int]]:
    """One automaton of all, each with its forced opening; the state in which a turn begins, and the one behind the
    trigger, of each. An edge that leaves goes to the free state of its own automaton."""
    parts, first, entered, size = [Automaton(*np.zeros((3, 0), int))], [], [], 0
    for index in range(max(1, len(automata))):
        free = state = -1 - index
        if automata:
            sources, tokens, targets = _without(automata[index], np.asarray(banned, int))
            parts.append(Automaton(sources + size, tokens, np.where(targets < 0, free, targets + size)))
            state, size = size, size + 1 + int(sources.max())
        entered.append(state)
        state = free if trigger else state
        if forced:
            chain = np.arange(size, size + len(forced))
            parts.append(Automaton(chain, np.asarray(forced), np.append(chain[1:], state)))
            state, size = size, size + len(forced)
        first.append(state)
    return Automaton(*(np.concatenate(x) for x in zip(*parts, strict=True))), first, entered


def _without(automaton: Automaton, banned: Int[np.ndarray, "M"]) -> Automaton:
    """The automaton without banned tokens and without the ways that then lead nowhere: it can be left from every state
    that is reached."""
    sources, tokens, targets = automaton
    keep = ~np.isin(tokens, banned)
    size = max(sources.max(), targets.max()) + 2  # one more: target -1 reads the last, from which it is left
    codes = np.unique(sources[keep] * size + targets[keep] + 1)
    begins, ends = codes // size, codes % size - 1
    leads_out = np.zeros(size, bool)
    leads_out[-1] = True
    while len(found := begins[leads_out[ends] & ~leads_out[begins]]):
        leads_out[found] = True
    if not leads_out[0]:
        raise ValueError(f"there is no way through an automaton without the banned tokens {banned.tolist()}")
    keep &= leads_out[targets]
    return Automaton(sources[keep], tokens[keep], targets[keep])


def _rounded(size: int) -> int:
    """The next power of two."""
    return 1 << max(size - 1, 0).bit_length()
