"""Search-R1's episode over the geography world, as a device environment and as a host environment.

A turn of the policy ends with `</search>` or `</answer>`. A search brings the best passages between `<information>` and
`</information>`, an answer ends the episode with reward 1 if it is an exact match and 0 if not. A turn that closes
neither is spent: the policy is told so, and it counts as a search. After `max_searches` of them anything but an answer
ends the episode with reward 0. (Jin et al. 2025, "Search-R1", but for the last rule: there the last turn simply has no
search.)

Both environments give the same observations, rewards and ends for the same turns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from jaxrl_llm.data.text_hashes import (
    TokenHashes,
    WordTable,
    answer_hash,
    answer_text_hash,
    known_words,
    token_hashes,
    word_table,
)
from jaxrl_llm.data.worlds.geography import CORRECTION, Question, geography_index
from jaxrl_llm.models.tokenizer import Tokenizer
from jaxrl_llm.retrieval.bm25 import Bm25Arrays, Bm25Index, device_index, search, top_passages
from jaxrl_llm.rewards.parse import parse_action
from jaxrl_llm.rewards.qa import exact_match

TAGS = ("<search>", "</search>", "<answer>", "</answer>", "<information>", "</information>")


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["prompt_tokens", "prompt_length", "answers", "answer_mask", "hops"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class GeographyTask:
    """A question as arrays; `encode_tasks` makes them with a leading axis of questions."""

    prompt_tokens: Int[Array, "M"]
    prompt_length: Int[Array, ""]
    answers: UInt32[Array, "A 2"]  # hashes of the gold answers
    answer_mask: Bool[Array, "A"]
    hops: Int[Array, ""]


@partial(jax.tree_util.register_dataclass, data_fields=["answers", "answer_mask", "searches"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class GeographyState:
    """What an episode keeps between turns."""

    answers: UInt32[Array, "A 2"]
    answer_mask: Bool[Array, "A"]
    searches: Int[Array, ""]  # spent so far


def encode_tasks(
    questions: Sequence[Question], tokenizer: Tokenizer, *, min_prompt: int = 1, max_prompt: int | None = None
) -> GeographyTask:
    """Questions as a `GeographyTask` with a leading axis: prompts padded to `max_prompt` tokens, or to the longest one.

    Raises:
      ValueError: there is no question, a question has no answer, or a prompt has fewer than `min_prompt` or more than
        `max_prompt` tokens.
    """
    if not questions:
        raise ValueError("questions is empty; there must be at least one to make tasks of")
    for question in questions:
        if not question.answers:
            raise ValueError(f"question {question.question!r} has no answer; give it at least one")
    prompts = tokenizer.encode_batch([question.question for question in questions])
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    width = int(lengths.max()) if max_prompt is None else max_prompt
    if lengths.max() > width:
        raise ValueError(
            f"max_prompt is {max_prompt}, but question {questions[int(lengths.argmax())].question!r} has "
            f"{lengths.max()} tokens; raise max_prompt or leave the question out"
        )
    if lengths.min() < min_prompt:
        raise ValueError(
            f"min_prompt is {min_prompt}, but question {questions[int(lengths.argmin())].question!r} has "
            f"{lengths.min()} tokens; lower min_prompt or leave the question out"
        )
    most = max(len(question.answers) for question in questions)
    mask = np.array([[i < len(question.answers) for i in range(most)] for question in questions])
    answers = np.zeros((len(questions), most, 2), np.uint32)
    answers[mask] = [answer_text_hash(answer) for question in questions for answer in question.answers]
    return GeographyTask(
        prompt_tokens=jnp.array(_padded(prompts, width)),
        prompt_length=jnp.array(lengths),
        answers=jnp.array(answers),
        answer_mask=jnp.array(mask),
        hops=jnp.array([question.hops for question in questions], jnp.int32),
    )


def _padded(rows: Sequence[Sequence[int]], width: int) -> np.ndarray:
    out = np.zeros((len(rows), width), np.int32)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["hashes", "words", "index", "passages", "passage_lengths", "correction"],
    meta_fields=["max_searches", "search_enabled", "num_passages", "max_words", "tags"],
)
@dataclasses.dataclass(frozen=True)
class GeographyEnv:
    """The environment inside `jit`, a `DeviceEnv`. Made by `make_geography_env`."""

    hashes: TokenHashes
    words: WordTable
    index: Bm25Arrays
    passages: Int[Array, "N+1 L"]  # tokens; the last row is an empty passage
    passage_lengths: Int[Array, "N+1"]
    correction: Int[Array, "C"]
    max_searches: int
    search_enabled: bool
    num_passages: int
    max_words: int
    tags: tuple[int, ...]  # ids of TAGS

    @property
    def max_observation(self) -> int:
        """Size of the observation array."""
        found = self.num_passages * self.passages.shape[1] if self.search_enabled else 0
        return max(2 + found, self.correction.shape[0])

    def reset(self, key: Key[Array, ""], task: GeographyTask) -> tuple[GeographyState, Int[Array, "M"], Int[Array, ""]]:
        """The state at the start, and the question. `key` is not used."""
        del key
        state = GeographyState(task.answers, task.answer_mask, jnp.zeros((), jnp.int32))
        return state, task.prompt_tokens, task.prompt_length

    def step(
        self, state: GeographyState, turn_tokens: Int[Array, "L"], length: Int[Array, ""]
    ) -> tuple[GeographyState, Int[Array, "O"], Int[Array, ""], Float[Array, ""], Bool[Array, ""]]:
        """One turn: the next state, observation and its length, reward (1 or 0), and whether the episode is over."""
        open_search, close_search, open_answer, close_answer, open_information, close_information = self.tags
        search_start, search_stop, searched = _pair(turn_tokens, length, open_search, close_search)
        answer_start, answer_stop, answered = _pair(turn_tokens, length, open_answer, close_answer)
        # The pair that opens first is the action, as in `parse_action`.
        is_search = searched & (~answered | (search_start < answer_start))
        is_answer = answered & ~is_search

        answer = answer_hash(self.hashes, turn_tokens, answer_stop, answer_start)
        right = is_answer & jnp.any(jnp.all(answer == state.answers, axis=-1) & state.answer_mask)
        over = is_answer | (state.searches >= self.max_searches)

        if self.search_enabled:
            query = known_words(self.hashes, self.words, turn_tokens, search_start, search_stop, self.max_words)
            ids = search(self.index, query, self.num_passages)
            information, size = self._information(ids)
        else:
            empty = jnp.array([open_information, close_information], jnp.int32)
            information, size = jnp.pad(empty, (0, self.max_observation - 2)), jnp.int32(2)
        correction = jnp.pad(self.correction, (0, self.max_observation - self.correction.shape[0]))
        observation = jnp.where(is_search, information, correction)
        size = jnp.where(over, 0, jnp.where(is_search, size, self.correction.shape[0]))
        next_state = dataclasses.replace(state, searches=state.searches + 1)
        return next_state, observation, size.astype(jnp.int32), right.astype(jnp.float32), over

    def _information(self, ids: Int[Array, "k"]) -> tuple[Int[Array, "O"], Int[Array, ""]]:
        """Passages between their tags; id -1 is the empty passage."""
        open_information, close_information = self.tags[4:]
        rows = jnp.where(ids < 0, self.passages.shape[0] - 1, ids)
        lengths = self.passage_lengths[rows]
        ends = 1 + jnp.cumsum(lengths)
        position = jnp.arange(self.passages.shape[1])
        places = jnp.where(position < lengths[:, None], (ends - lengths)[:, None] + position, self.max_observation)
        out = jnp.zeros(self.max_observation, jnp.int32).at[0].set(open_information)
        out = out.at[places.ravel()].set(self.passages[rows].ravel(), mode="drop").at[ends[-1]].set(close_information)
        return out, ends[-1] + 1


def _pair(tokens: Int[Array, "L"], length: Int[Array, ""], opening: int, closing: int) -> tuple[Array, Array, Array]:
    """Start and stop of what the first `opening` and the first `closing` behind it enclose; whether there are both."""
    position = jnp.arange(tokens.shape[0])
    inside = position < length
    start = jnp.min(jnp.where(inside & (tokens == opening), position, tokens.shape[0]))
    stop = jnp.min(jnp.where(inside & (tokens == closing) & (position > start), position, tokens.shape[0]))
    return start + 1, stop, stop < tokens.shape[0]


def make_geography_env(
    tokenizer: Tokenizer, *, max_searches: int = 3, search_enabled: bool = True, num_passages: int = 1
) -> GeographyEnv:
    """The device environment for turns and prompts of `tokenizer`.

    Raises:
      ValueError: a number is out of range, or the tokenizer does not have each tag as one token.
    """
    _check_limits(max_searches, num_passages)
    missing = [tag for tag in TAGS if tag not in tokenizer.special_ids]
    if missing:
        raise ValueError(f"the tokenizer has no special tokens {missing}; add them, each as one token")
    index = geography_index()
    passages = [*tokenizer.encode_batch(index.passages), []]
    lengths = [len(passage) for passage in passages]
    return GeographyEnv(
        hashes=token_hashes(tokenizer),
        words=word_table(sorted(index.terms, key=index.terms.__getitem__)),
        index=device_index(index),
        passages=jnp.array(_padded(passages, max(lengths))),
        passage_lengths=jnp.array(lengths, jnp.int32),
        correction=jnp.array(tokenizer.encode(CORRECTION), jnp.int32),
        max_searches=max_searches,
        search_enabled=search_enabled,
        num_passages=num_passages,
        max_words=index.max_terms or 8,
        tags=tuple(tokenizer.special_ids[tag] for tag in TAGS),
    )


class HostState(NamedTuple):
    """What an episode on the host keeps between turns."""

    question: Question
    searches: int


@dataclasses.dataclass(frozen=True)
class GeographyHostEnv:
    """The environment on strings, a `HostEnv`. Made by `make_geography_host_env`."""

    index: Bm25Index
    max_searches: int
    search_enabled: bool
    num_passages: int

    def reset(self, task: Question) -> tuple[HostState, str]:
        """The state at the start, and the question."""
        return HostState(task, 0), task.question

    def step(self, state: HostState, turn_text: str) -> tuple[HostState, str, float, bool]:
        """One turn: the next state, observation, reward (1 or 0), and whether the episode is over."""
        action, content = parse_action(turn_text)
        spent = state._replace(searches=state.searches + 1)
        if action == "answer":
            return spent, "", exact_match(content, state.question.answers), True
        if state.searches >= self.max_searches:
            return spent, "", 0.0, True
        if action != "search":
            return spent, CORRECTION, 0.0, False
        found: list[int] = top_passages(self.index, content, self.num_passages).tolist() if self.search_enabled else []
        passages = "".join(f" {self.index.passages[i]}" for i in found if i >= 0)
        return spent, f"<information>{passages}</information>", 0.0, False


def make_geography_host_env(
    *, max_searches: int = 3, search_enabled: bool = True, num_passages: int = 1
) -> GeographyHostEnv:
    """The host environment.

    Raises:
      ValueError: a number is out of range.
    """
    _check_limits(max_searches, num_passages)
    return GeographyHostEnv(geography_index(), max_searches, search_enabled, num_passages)


def _check_limits(max_searches: int, num_passages: int) -> None:
    if max_searches < 0:
        raise ValueError(f"max_searches must be at least 0, got {max_searches}")
    if num_passages < 1:
        raise ValueError(f"num_passages must be at least 1, got {num_passages}")
