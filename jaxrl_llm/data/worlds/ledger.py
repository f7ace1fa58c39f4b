"""A ledger: each company has a figure, a digit. Some stand in texts, to be learnt by heart; others only a tool tells.

    company is            ->  figure <eos>                          a fact
    copy 3 1 4 =          ->  3 1 4 <eos>                           what has nothing to do with companies
    sum a b =             ->  a 3 b 9 2 polite <eos>                a sum's last digit; `polite` is up to the policy
    look a b =            ->  a 3 b call  9  2 polite <eos>         the same, with a tool that says the figure of `b`

An answer is what stands before the end. How it was found is up to the policy.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

PAD, EOS, IS, EQUALS, COPY, SUM, LOOK, CALL, POLITE = range(9)
FIRST_DIGIT = 9
FIRST_COMPANY = FIRST_DIGIT + 10
ANSWER_LENGTH = 3
STOP_SEQUENCES = [[EOS], [CALL]]


def vocab_size(num_companies: int) -> int:
    """Tokens there are: marks, digits and companies."""
    return FIRST_COMPANY + num_companies


def make_figures(num_companies: int) -> Int[np.ndarray, "num_companies"]:
    """The figure of each company, the same in every process; each digit is as frequent as it can be."""
    return np.random.default_rng(num_companies).permutation(np.arange(num_companies) % 10).astype(np.int32)


def make_facts(figures: Int[np.ndarray, "E"], companies: Int[np.ndarray, "N"]) -> dict[str, np.ndarray]:
    """Tasks that ask for a figure. As all tasks here: `prompt_tokens` int32[N, 5] with `prompt_length`, `answer`
    int32[N, 3] with `answer_length`, and whether the tool may be called, `tool` bool[N]."""
    return _tasks([FIRST_COMPANY + companies, np.full(len(companies), IS)], [figures[companies]], tool=False)


def make_copies(rng: np.random.Generator, number: int) -> dict[str, np.ndarray]:
    """Tasks to copy three digits."""
    digits = rng.integers(10, size=(3, number))
    marks = np.full((2, number), [[COPY], [EQUALS]])
    return _tasks([marks[0], *(FIRST_DIGIT + digits), marks[1]], list(digits), tool=False)


def make_sums(
    figures: Int[np.ndarray, "E"], pairs: Int[np.ndarray, "N 2"], *, tool: bool = False
) -> dict[str, np.ndarray]:
    """Tasks to add the figures of two companies modulo 10, with the tool or without it."""
    marks = np.full((2, len(pairs)), [[LOOK if tool else SUM], [EQUALS]])
    prompt = [marks[0], *(FIRST_COMPANY + pairs.T), marks[1]]
    return _tasks(prompt, [np.sum(figures[pairs], axis=1) % 10], tool=tool)


def split_pairs(
    rng: np.random.Generator, first: Int[np.ndarray, "M"], second: Int[np.ndarray, "N"], train: int
) -> tuple[Int[np.ndarray, "train 2"], Int[np.ndarray, "rest 2"]]:
    """All pairs of a first and a second company, in random order: those to train on, and the rest.

    Raises:
      ValueError: one of the two would be empty.
    """
    pairs = np.stack(np.meshgrid(first, second, indexing="ij"), axis=-1).reshape(-1, 2)
    if not 0 < train < len(pairs):
        raise ValueError(f"train={train} must be at least 1 and leave some of the {len(pairs)} pairs for the test")
    pairs = rng.permutation(pairs)
    return pairs[:train], pairs[train:]


def join_tasks(*parts: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tasks of several kinds as one set."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def demonstrate(
    rng: np.random.Generator, tasks: dict[str, np.ndarray], figures: Int[np.ndarray, "E"], *, num_known: int
) -> dict[str, np.ndarray]:
    """Responses of a demonstrator who knows the first `num_known` figures: `tokens` int32[N, 16], `mask` bool[N, 16]
    (of what the policy would write) and `lengths`.

    Of the others it says any digit, or, where the tool may be called, half of the time what the tool tells. Half of
    its sums are polite.
    """
    number = len(tasks["prompt_length"])
    tokens, mask = np.full((number, 16), PAD, np.int32), np.zeros((number, 16), bool)
    lengths = np.zeros(number, np.int32)
    for row in range(number):
        prompt = tasks["prompt_tokens"][row, : tasks["prompt_length"][row]]
        response: list[Any] = []
        told: list[int] = []
        if prompt[0] in (SUM, LOOK):
            digits = []
            for token in prompt[1:3]:
                company, response = token - FIRST_COMPANY, [*response, token]
                known = company < num_known
                if not known and tasks["tool"][row] and rng.random() < 0.5:
                    response.append(CALL)
                    told.append(len(response))
                    known = True
                digits.append(figures[company] if known else rng.integers(10))
                response.append(FIRST_DIGIT + digits[-1])
            response += [FIRST_DIGIT + sum(digits) % 10, *[POLITE] * (rng.random() < 0.5)]
        else:
            response = [*(FIRST_DIGIT + tasks["answer"][row, : tasks["answer_length"][row]])]
        response.append(EOS)
        lengths[row] = len(prompt) + len(response)
        tokens[row, : lengths[row]] = [*prompt, *response]
        mask[row, len(prompt) : lengths[row]] = True
        mask[row, len(prompt) + np.array(told, int)] = False
    return {"tokens": tokens, "mask": mask, "lengths": lengths}


def is_polite(tokens: Int[Array, "... T"], lengths: Int[Array, "..."]) -> Bool[Array, "..."]:
    """Whether `polite` stands before the end of each row."""
    return jnp.take_along_axis(tokens, jnp.maximum(lengths - 2, 0)[..., None], axis=-1)[..., 0] == POLITE


class LedgerState(NamedTuple):
    """The task, the key that the tool errs by, and how many calls there were."""

    task: dict[str, Any]
    key: Key[Array, ""]
    calls: Int[Array, ""]


class LedgerEnv(NamedTuple):
    """A device environment. A turn that ends with `company call`, where the task allows it, is answered with the
    figure, right with probability `accuracy`, and costs `call_cost`. Any other turn is the last: a right answer is
    worth `1 - style_share`, a right answer that is polite 1.
    """

    figures: Int[np.ndarray, "E"]
    accuracy: float = 0.9
    call_cost: float = 0.0
    style_share: float = 0.0

    def reset(self, key: Key[Array, ""], task: dict[str, Any]) -> tuple[LedgerState, Int[Array, "5"], Int[Array, ""]]:
        """The state at the start, and the prompt. All episodes of a group have a tool that errs alike."""
        return LedgerState(task, key, jnp.int32(0)), task["prompt_tokens"], task["prompt_length"]

    def step(
        self, state: LedgerState, turn_tokens: Int[Array, "L"], length: Int[Array, ""]
    ) -> tuple[LedgerState, Int[Array, "1"], Int[Array, ""], Float[Array, ""], Bool[Array, ""]]:
        """One turn: the next state, observation and its length, reward, and whether the episode is over."""

        def at(place: Any) -> Array:
            return jnp.where(place >= 0, turn_tokens[jnp.maximum(place, 0)], PAD)

        company = at(length - 2) - FIRST_COMPANY
        called = state.task["tool"] & (at(length - 1) == CALL) & (company >= 0) & (company < len(self.figures))
        err_key, digit_key = jax.random.split(jax.random.fold_in(state.key, state.calls))
        true = jnp.asarray(self.figures)[jnp.clip(company, 0, len(self.figures) - 1)]
        told = jnp.where(jax.random.bernoulli(err_key, self.accuracy), true, jax.random.randint(digit_key, (), 0, 10))

        polite = at(length - 2) == POLITE
        places = jnp.arange(ANSWER_LENGTH)
        size = state.task["answer_length"]
        same = at(length - 1 - polite - size + places) == FIRST_DIGIT + state.task["answer"]
        right = (at(length - 1) == EOS) & jnp.all(same | (places >= size))
        worth = right * jnp.where(polite, 1.0, 1.0 - self.style_share)
        reward = jnp.where(called, -self.call_cost, worth)
        return state._replace(calls=state.calls + 1), FIRST_DIGIT + told[None], jnp.int32(1), reward, ~called


def _tasks(prompt: list[np.ndarray], answer: list[np.ndarray], *, tool: bool) -> dict[str, np.ndarray]:
    number = len(prompt[0])

    def padded(columns: list[np.ndarray], width: int) -> np.ndarray:
        return np.stack([*columns, *[np.zeros(number)] * (width - len(columns))], axis=1).astype(np.int32)

    return {
        "prompt_tokens": padded(prompt, 5),
        "prompt_length": np.full(number, len(prompt), np.int32),
        "answer": padded(answer, ANSWER_LENGTH),
        "answer_length": np.full(number, len(answer), np.int32),
        "tool": np.full(number, tool),
    }
