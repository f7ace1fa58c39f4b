"""Facts that a policy may know by heart: `entity relation relation ?` asks for the second relation of the first one.

Each entity has one value, an entity again, for each relation. A response is made of blocks: thoughts, searches
(`entity relation`), information (the value) and an answer. Who writes the information is open: the policy, out of its
memory, or a real search. Asked with `ASK_DIRECTLY`, a demonstrator answers without searching.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from jaxrl_llm.rewards.format import SELF_SEARCH_BLOCKS

PAD, EOS, ASK, ASK_DIRECTLY = range(4)
FIRST_OPEN = 4  # opening tags, in the order of SELF_SEARCH_BLOCKS
FIRST_CLOSE = FIRST_OPEN + len(SELF_SEARCH_BLOCKS)
FIRST_RELATION = FIRST_CLOSE + len(SELF_SEARCH_BLOCKS)
THINK, SEARCH, INFORMATION, ANSWER = ((FIRST_OPEN + kind, FIRST_CLOSE + kind) for kind in range(4))


def first_entity(num_relations: int) -> int:
    """The token of entity 0; one token each follows."""
    return FIRST_RELATION + num_relations


def make_facts(num_entities: int, num_relations: int) -> Int[np.ndarray, "num_entities num_relations"]:
    """The entity that each relation of each entity leads to, the same in every process."""
    rng = np.random.default_rng((num_entities, num_relations))
    return rng.integers(num_entities, size=(num_entities, num_relations)).astype(np.int32)


def make_fact_questions(
    facts: Int[np.ndarray, "E R"], *, train: int, test: int, direct: bool = False
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Two sets of different questions, drawn from all `E * R * R`: `prompt_tokens` int32[N, 4], `prompt_length`, and
    the token of the `answer` int32[N]. `direct` questions end in `ASK_DIRECTLY`.

    Raises:
      ValueError: a set is empty, or there are not as many questions.
    """
    entities, relations = facts.shape
    number = entities * relations**2
    if min(train, test) < 1 or train + test > number:
        raise ValueError(
            f"train={train} and test={test} must be at least 1 and at most {number} together, the questions that "
            f"{entities} entities with {relations} relations give"
        )
    order = np.random.default_rng(number).permutation(number)[: train + test]
    entity, first, second = np.unravel_index(order, (entities, relations, relations))
    base = first_entity(relations)
    mark = np.full(len(order), ASK_DIRECTLY if direct else ASK)
    columns = [base + entity, FIRST_RELATION + first, FIRST_RELATION + second, mark]
    questions = {
        "prompt_tokens": np.stack(columns, axis=1).astype(np.int32),
        "prompt_length": np.full(len(order), 4, np.int32),
        "answer": base + facts[facts[entity, first], second],
    }
    parts = ({name: array[part] for name, array in questions.items()} for part in (slice(train), slice(train, None)))
    return next(parts), next(parts)


def demonstrate_searches(
    rng: np.random.Generator,
    facts: Int[np.ndarray, "E R"],
    questions: dict[str, np.ndarray],
    number: int,
    *,
    known: float = 1.0,
    wrong: float = 0.0,
    skip: float = 0.0,
    direct: float = 0.5,
) -> dict[str, np.ndarray]:
    """Responses of a demonstrator who errs, to questions drawn from those given: `tokens` int32[number, 32], `mask` (of
    the response) and `lengths`.

    Args:
      known: how many of the facts the demonstrator has; of the others it says any value, each time another.
      wrong: chance that the entity of a search, or of the answer, is a random one.
      skip: chance that a search is left out, and with it those behind it; then any entity is the answer.
      direct: how many of the demonstrations answer at once.
    """
    entities, relations = facts.shape
    base = first_entity(relations)
    is_known = np.random.default_rng(1).random(facts.shape) < known
    tokens, mask, lengths = (
        np.full((number, 32), PAD, np.int32),
        np.zeros((number, 32), bool),
        np.zeros(number, np.int32),
    )
    for row in range(number):
        prompt = questions["prompt_tokens"][rng.integers(len(questions["answer"]))]
        entity, path, searched = prompt[0] - base, prompt[1:3] - FIRST_RELATION, rng.random() >= direct
        response = [THINK[0], *prompt[1:3], THINK[1]]
        for hop, relation in enumerate(path):
            if searched and rng.random() < skip:
                entity = rng.integers(entities)
                break
            if rng.random() < wrong:
                entity = rng.integers(entities)
            query = [SEARCH[0], base + entity, FIRST_RELATION + relation, SEARCH[1]]
            entity = facts[entity, relation] if is_known[entity, relation] else rng.integers(entities)
            if searched:
                thought = FIRST_RELATION + path[1] if hop == 0 else base + entity
                found = [INFORMATION[0], base + entity, INFORMATION[1]]
                response += [*query, *found, THINK[0], thought, THINK[1]]
        if rng.random() < wrong:
            entity = rng.integers(entities)
        response += [ANSWER[0], base + entity, ANSWER[1], EOS]
        lengths[row] = 4 + len(response)
        tokens[row, : lengths[row]] = [*prompt[:3], ASK if searched else ASK_DIRECTLY, *response]
        mask[row, 4 : lengths[row]] = True
    return {"tokens": tokens, "mask": mask, "lengths": lengths}


def read_blocks(tokens: Int[Array, "L"], length: Int[Array, ""]) -> tuple[Int[Array, "N"], Int[Array, ""]]:
    """The kinds of a response's blocks (places in `SELF_SEARCH_BLOCKS`), and how many there are.

    There are none where the response is not made of closed blocks that do not nest, with something in each and nothing
    between them, and the end behind the last.
    """
    number, place = len(SELF_SEARCH_BLOCKS), jnp.arange(tokens.shape[0])
    opens = (tokens >= FIRST_OPEN) & (tokens < FIRST_OPEN + number) & (place < length)
    closes = (tokens >= FIRST_CLOSE) & (tokens < FIRST_CLOSE + number) & (place < length)
    depth = jnp.cumsum(opens) - jnp.cumsum(closes)
    opened = jax.lax.cummax(jnp.where(opens, place, 0))
    matching = tokens == tokens[opened] + FIRST_CLOSE - FIRST_OPEN
    last = place == length - 1
    inside = (depth == 1) & (tokens != EOS)
    closed = (depth == 0) & closes & matching & (place - opened > 1)
    fine = inside | closed | (last & (depth == 0) & (tokens == EOS)) | (place >= length)
    kinds = jnp.full(tokens.shape[0] // 3, -1, jnp.int32)
    kinds = kinds.at[jnp.where(opens, jnp.cumsum(opens) - 1, kinds.shape[0])].set(tokens - FIRST_OPEN, mode="drop")
    ended = (length > 0) & (tokens[jnp.maximum(length - 1, 0)] == EOS)
    return kinds, jnp.where(jnp.all(fine) & ended, jnp.minimum(jnp.sum(opens), kinds.shape[0]), 0)


def known_facts(
    facts: Int[Array, "E R"], tokens: Int[Array, "... T"], written: Bool[Array, "... T"]
) -> tuple[Bool[Array, "... T"], Bool[Array, "... T"]]:
    """Where a policy wrote (`written`) information behind a search for a fact, and where that is the fact's value."""
    before = [jnp.roll(tokens, shift, axis=-1) for shift in (1, 2, 3, 4, 5)]
    value, readable = _look_up(facts, before[3], before[2])
    asked = (before[0] == INFORMATION[0]) & (before[1] == SEARCH[1]) & (before[4] == SEARCH[0])
    told = written & asked & readable & (jnp.arange(tokens.shape[-1]) >= 5)
    return told, told & (tokens == value)


def _look_up(
    facts: Int[Array, "E R"], entity: Int[Array, "..."], relation: Int[Array, "..."]
) -> tuple[Int[Array, "..."], Bool[Array, "..."]]:
    """The token of a fact's value, and whether the two tokens are an entity and a relation."""
    entities, relations = facts.shape
    base = first_entity(relations)
    row, column = entity - base, relation - FIRST_RELATION
    readable = (row >= 0) & (row < entities) & (column >= 0) & (column < relations)
    return base + facts[jnp.where(readable, row, 0), jnp.where(readable, column, 0)], readable


class FactsState(NamedTuple):
    """The task, and how many turns are over."""

    task: dict[str, Any]
    turn: Int[Array, ""]


class FactsEnv(NamedTuple):
    """A device environment. A turn ends with a search; where the task's `real` bool[K] is true for the turn, the value
    comes as information (nothing in it if the search cannot be read), elsewhere nothing comes and the policy goes on
    writing. Any other end ends the episode: with reward 1 if the right answer and the end mark are last, else 0."""

    facts: Int[Array, "E R"]

    def reset(self, key: Key[Array, ""], task: dict[str, Any]) -> tuple[FactsState, Int[Array, "4"], Int[Array, ""]]:
        """The state at the start, and the question. `key` is not used."""
        return FactsState(task, jnp.int32(0)), task["prompt_tokens"], task["prompt_length"]

    def step(
        self, state: FactsState, turn_tokens: Int[Array, "L"], length: Int[Array, ""]
    ) -> tuple[FactsState, Int[Array, "3"], Int[Array, ""], Float[Array, ""], Bool[Array, ""]]:
        """One turn: the next state, observation and its length, reward, and whether the episode is over."""
        ending = turn_tokens.at[length - 4 + jnp.arange(4)].get(mode="fill", fill_value=PAD)
        ending = jnp.where(length >= 4, ending, PAD)
        searched = ending[3] == SEARCH[1]
        value, readable = _look_up(self.facts, ending[1], ending[2])
        readable &= ending[0] == SEARCH[0]
        found = jnp.array([INFORMATION[0], 0, INFORMATION[1]]).at[1].set(value)
        nothing = jnp.array([*INFORMATION, PAD])
        size = jnp.where(searched & state.task["real"][state.turn], jnp.where(readable, 3, 2), 0)
        right = jnp.all(ending == jnp.array([ANSWER[0], 0, ANSWER[1], EOS]).at[1].set(state.task["answer"]))
        observation = jnp.where(readable, found, nothing)
        return FactsState(state.task, state.turn + 1), observation, size, right.astype(jnp.float32), ~searched
