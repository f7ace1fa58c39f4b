"""A long ledger: accounts with a balance, updates that come one by one, and in the end a question about one account.

    context      begin a 3 b 7 c 1 d 4 <eos>              the balances so far
    reading      next -> b 2    next -> a 9 ...           a turn brings an update, whatever it says
    full         next -> c 5 summarize                    the policy writes balances, which the next context begins with
    the end      next -> d 6 ask b                        the policy answers: 2 <eos>

One episode of `UpdatesEnv` is one context, and as many follow each other as the ledger needs. The account asked about
may have been updated long before, so what a summary forgets is lost.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.sampling.pieces import Event, Piece, reset_context, should_summarize, split_on_summary

PAD, EOS, BEGIN, NEXT, SUMMARIZE, ASK = range(6)
ACCOUNTS, BALANCES = 4, 8
FIRST_ACCOUNT = 6
FIRST_BALANCE = FIRST_ACCOUNT + ACCOUNTS
VOCAB_SIZE = FIRST_BALANCE + BALANCES
STOP_SEQUENCES = [[NEXT], [EOS]]
SUMMARY_TOKENS = 2 * ACCOUNTS + 1
RESERVE = 3 + 1 + SUMMARY_TOKENS  # another turn and its update, the instruction, the summary


class UpdatesState(NamedTuple):
    """A ledger, and where its reading stands in this context."""

    task: dict[str, Any]
    seen: Int[Array, ""]  # updates
    context: Int[Array, ""]  # tokens
    asked_for: Int[Array, ""]  # 0: reading, 1: a summary, 2: the answer


def write_balances(balances: Int[np.ndarray, "... accounts"]) -> Int[np.ndarray, "... summary"]:
    """A summary: each account with its balance, and the end."""
    accounts = np.broadcast_to(FIRST_ACCOUNT + np.arange(ACCOUNTS), balances.shape)
    pairs = np.stack([accounts, FIRST_BALANCE + balances], axis=-1).reshape(*balances.shape[:-1], -1)
    return np.concatenate([pairs, np.full((*balances.shape[:-1], 1), EOS)], axis=-1).astype(np.int32)


def make_ledgers(rng: np.random.Generator, number: int, *, updates: int) -> dict[str, np.ndarray]:
    """Random ledgers, as tasks of `UpdatesEnv` from their beginning: `updates` int32[number, K, 2] (account and
    balance, as tokens), `asked`, `answer` (tokens), `seen` (0), `memory` int32[number, 9] with `memory_length` (the
    first balances) and `open` (true).

    How long ago the account asked about was updated is drawn evenly, from never to just now.

    Raises:
      ValueError: a number below 1.
    """
    if number < 1 or updates < 1:
        raise ValueError(f"number={number} and updates={updates} must be at least 1")
    balances = rng.integers(BALANCES, size=(number, ACCOUNTS))
    asked = rng.integers(ACCOUNTS, size=number)
    last = rng.integers(-1, updates, size=number)
    others = (asked[:, None] + rng.integers(1, ACCOUNTS, size=(number, updates))) % ACCOUNTS
    times = np.arange(updates)
    accounts = np.where(times > last[:, None], others, rng.integers(ACCOUNTS, size=(number, updates)))
    accounts = np.where(times == last[:, None], asked[:, None], accounts)
    values = rng.integers(BALANCES, size=(number, updates))
    rows = np.arange(number)
    answer = np.where(last >= 0, values[rows, np.maximum(last, 0)], balances[rows, asked])
    return {
        "updates": np.stack([FIRST_ACCOUNT + accounts, FIRST_BALANCE + values], axis=2).astype(np.int32),
        "asked": (FIRST_ACCOUNT + asked).astype(np.int32),
        "answer": (FIRST_BALANCE + answer).astype(np.int32),
        "seen": np.zeros(number, np.int32),
        "memory": write_balances(balances),
        "memory_length": np.full(number, SUMMARY_TOKENS, np.int32),
        "open": np.ones(number, bool),
    }


@dataclasses.dataclass(frozen=True)
class UpdatesEnv:
    """A `DeviceEnv` of one context: reward 1 for the right answer. A task that is not `open` ends with its first
    turn."""

    window: int

    def reset(self, key: jax.Array, task: dict[str, Any]) -> tuple[UpdatesState, Int[Array, "L0"], Int[Array, ""]]:
        """What the context begins with; `key` is not used."""
        begin, one = jnp.full((1, 1), BEGIN, jnp.int32), jnp.ones(1, jnp.int32)
        tokens, lengths = reset_context(begin, one, task["memory"][None], task["memory_length"][None])
        return UpdatesState(task, task["seen"], lengths[0], jnp.int32(0)), tokens[0], lengths[0]

    def step(
        self, state: UpdatesState, turn_tokens: Int[Array, "L"], length: Int[Array, ""]
    ) -> tuple[UpdatesState, Int[Array, "4"], Int[Array, ""], Float[Array, ""], Bool[Array, ""]]:
        """The next update, behind the last one the question, and the instruction where the window is nearly full."""
        task, seen = state.task, state.seen + 1
        number = task["updates"].shape[0]
        account, balance = task["updates"][jnp.minimum(state.seen, number - 1)]
        context = state.context + length + 2
        last = seen >= number
        full = should_summarize(context, window=self.window, reserve=RESERVE) & ~last
        observation = jnp.stack([account, balance, jnp.where(last, ASK, SUMMARIZE), task["asked"]])
        size = 2 + jnp.where(last, 2, jnp.where(full, 1, 0))
        right = (state.asked_for == 2) & (length == 2) & (turn_tokens[0] == task["answer"]) & (turn_tokens[1] == EOS)
        over = (state.asked_for > 0) | ~task["open"]
        asked_for = jnp.where(last, 2, jnp.where(full, 1, 0))
        state = UpdatesState(task, seen, context + size - 2, asked_for)
        return state, observation, size, right.astype(jnp.float32), over


def demonstrate_updates(
    rng: np.random.Generator, ledgers: dict[str, np.ndarray], *, window: int, max_summaries: int, wrong: float = 0.0
) -> dict[str, np.ndarray]:
    """Contexts of a demonstrator who errs: `tokens` int32[M, window], `mask` (of its turns) and `lengths`, in order of
    the ledgers. A balance that it writes is a random one with the chance `wrong`, and it goes on from what it wrote."""
    pieces: list[Piece] = []

    def slip(values: np.ndarray) -> np.ndarray:
        return np.where(rng.random(values.shape) < wrong, rng.integers(BALANCES, size=values.shape), values)

    for row in range(len(ledgers["asked"])):
        opening = ledgers["memory"][row]
        believed, context = opening[1::2] - FIRST_BALANCE, 1 + len(opening)
        events = [Event("observation", opening.tolist())]
        updates = ledgers["updates"][row]
        for index, (account, balance) in enumerate(updates):
            believed[account - FIRST_ACCOUNT] = balance - FIRST_BALANCE
            context += 3
            events += [Event("policy", [NEXT]), Event("observation", [int(account), int(balance)])]
            if index + 1 == len(updates):
                asked = int(ledgers["asked"][row])
                answer = FIRST_BALANCE + int(slip(believed[asked - FIRST_ACCOUNT]))
                events += [Event("observation", [ASK, asked]), Event("policy", [answer, EOS])]
            elif should_summarize(context, window=window, reserve=RESERVE):
                believed = slip(believed)
                summary = write_balances(believed).tolist()
                context = 1 + len(summary)
                events += [Event("observation", [SUMMARIZE]), Event("summary", summary)]
        pieces += split_on_summary([BEGIN], events, window=window, reserve=RESERVE, max_summaries=max_summaries)
    tokens, mask = np.full((len(pieces), window), PAD, np.int32), np.zeros((len(pieces), window), bool)
    for index, piece in enumerate(pieces):
        tokens[index, : len(piece.tokens)] = piece.tokens
        mask[index, : len(piece.mask)] = piece.mask
    return {"tokens": tokens, "mask": mask, "lengths": np.array([len(piece.tokens) for piece in pieces], np.int32)}
