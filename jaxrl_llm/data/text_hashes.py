"""Words and answers of token sequences inside `jit`, without decoding them.

The words of a text are compared in a normal form (lower case, ASCII punctuation deleted). A polynomial hash of that
form can be composed from its parts, `H(ab) = H(a) * base^len(b) + H(b)` modulo 2^32, so each token of the vocabulary
carries the hash and the power of its own text, and the hash of a word comes out the same however the word was cut into
tokens. Two bases make 64 bits.

Everything equals what the host computes from the decoded text (`plain_words`, `normalize_answer`), with one exception:
a token that is a broken piece of a character (a byte of 128 or more) counts as a letter of its own that no text
contains. So a word that spells such a character byte by byte matches nothing here, while the host decodes it; and where
such bytes are no valid character, the host's decoder also gives up the ASCII bytes in the same run. Text that the
tokenizer itself encoded has such bytes only for characters that the world does not have.
"""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Sequence
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, UInt32

from jaxrl_llm.models.tokenizer import Tokenizer
from jaxrl_llm.rewards.qa import ARTICLES

_BASES = np.array([0x9E3779B1, 0x85EBCA77], np.uint32)  # odd, so that powers never vanish
_WORD_BASES = np.array([0xC2B2AE3D, 0x27D4EB2F], np.uint32)
_BROKEN = 0x110000  # behind the last character of Unicode


@partial(jax.tree_util.register_dataclass, data_fields=["values", "powers", "starts_word", "articles"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class TokenHashes:
    """What is known of each token of a vocabulary, made by `token_hashes`."""

    values: UInt32[Array, "V 2"]  # hash of the token's normalized text, 0 if nothing is left of it
    powers: UInt32[Array, "V 2"]  # base to the number of characters left
    starts_word: Bool[Array, "V"]  # the token's text begins with white space
    articles: UInt32[Array, "A 2"]  # hashes of a, an, the


@partial(jax.tree_util.register_dataclass, data_fields=["hashes", "ids"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class WordTable:
    """Words that can be looked up by hash, made by `word_table`."""

    hashes: UInt32[Array, "M 2"]  # ascending in the first hash
    ids: Int[Array, "M"]


def _mix(x: np.ndarray | Array) -> np.ndarray | Array:
    """A bijection of uint32 that spreads every bit (the finalizer of MurmurHash3)."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _characters(text: str, token: int = 0) -> list[int]:
    """Character codes of the normalized `text`, white space not among them."""
    codes = []
    for character in text:
        if character == "\ufffd":
            codes.append(_BROKEN + token)
        elif character not in string.punctuation and not character.isspace():
            codes += [ord(lower) for lower in character.lower()]
    return codes


@cache
def _character_hash(code: int) -> tuple[int, int]:
    first, second = _mix(np.array([code, code], np.uint32) + _WORD_BASES).tolist()
    return first, second


def _hash(codes: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Hash and power of a sequence of character codes, both uint32[2]."""
    values, powers = [0, 0], [1, 1]
    for code in codes:
        for i, (base, character) in enumerate(zip(_BASES.tolist(), _character_hash(code), strict=True)):
            values[i] = (values[i] * base + character) & 0xFFFFFFFF
            powers[i] = powers[i] * base & 0xFFFFFFFF
    return np.array(values, np.uint32), np.array(powers, np.uint32)


@cache
def _article_hashes() -> np.ndarray:
    return np.array([_hash(_characters(word))[0] for word in sorted(ARTICLES)])


@cache
def token_hashes(tokenizer: Tokenizer) -> TokenHashes:
    """The table for a tokenizer whose tokens have white space at their beginning only.

    Raises:
      ValueError: a token has white space behind another character, so that it belongs to two words.
    """
    before = tokenizer.encode("x")
    prefix = len(tokenizer.decode(before))
    texts = [tokenizer.decode([*before, token])[prefix:] for token in range(tokenizer.vocab_size)]
    for token, text in enumerate(texts):
        if any(character.isspace() for character in text.lstrip()):
            raise ValueError(f"token {token} is {text!r}, which spans two words; use a tokenizer that splits at spaces")
    parts = [_hash(_characters(text, token)) for token, text in enumerate(texts)]
    return TokenHashes(
        values=jnp.array([value for value, _ in parts]),
        powers=jnp.array([power for _, power in parts]),
        starts_word=jnp.array([text[:1].isspace() for text in texts]),
        articles=jnp.array(_article_hashes()),
    )


def word_table(words: Sequence[str]) -> WordTable:
    """A table of normalized `words`; the id of a word is its position.

    Raises:
      ValueError: two words share the first hash, which happens beyond some ten thousand words.
    """
    hashes = np.array([_hash(_characters(word))[0] for word in words], np.uint32).reshape(-1, 2)
    order = np.argsort(hashes[:, 0], kind="stable")
    hashes = hashes[order]
    same = np.flatnonzero(hashes[1:, 0] == hashes[:-1, 0])
    if len(same):
        first, second = words[order[same[0]]], words[order[same[0] + 1]]
        raise ValueError(
            f"words {first!r} and {second!r} share a hash; words must be different, and no more than some "
            f"ten thousand, got {len(words)}"
        )
    return WordTable(jnp.array(hashes), jnp.array(order, jnp.int32))


def word_hashes(
    table: TokenHashes, tokens: Int[Array, "L"], start: Int[Array, ""] | int, stop: Int[Array, ""] | int
) -> tuple[UInt32[Array, "L 2"], Bool[Array, "L"]]:
    """Hashes of the words of `tokens[start:stop]`.

    Returns:
      The hash of the word so far at each position, and which positions are the last of a word that is not empty. The
      hashes elsewhere mean nothing.
    """
    position = jnp.arange(tokens.shape[0])
    begins = table.starts_word[tokens] | (position == start)

    def join(left: tuple[Array, Array], right: tuple[Array, Array]) -> tuple[Array, Array]:
        return left[0] * right[0], left[1] * right[0] + right[1]

    # A power of zero where a word begins cuts off all that stands before.
    powers = jnp.where(begins[:, None], jnp.uint32(0), table.powers[tokens])
    _, hashes = jax.lax.associative_scan(join, (powers, table.values[tokens]))
    last = jnp.append(begins[1:], True) | (position == stop - 1)
    inside = (position >= start) & (position < stop)
    return hashes, inside & last & jnp.any(hashes != 0, axis=-1)


def answer_hash(
    table: TokenHashes, tokens: Int[Array, "L"], stop: Int[Array, ""] | int, start: Int[Array, ""] | int = 0
) -> UInt32[Array, "2"]:
    """Hash of the answer `tokens[start:stop]`: equal for two answers if and (but for a chance of 2^-64) only if
    `normalize_answer` of their texts is equal. Articles do not count; an empty answer hashes to 0."""
    hashes, is_word = word_hashes(table, tokens, start, stop)
    keep = is_word & ~jnp.any(jnp.all(hashes[:, None] == table.articles, axis=-1), axis=-1)
    powers = np.cumprod(np.tile(_WORD_BASES, (tokens.shape[0], 1)), axis=0, dtype=np.uint32)
    terms = _mix(hashes) * jnp.asarray(powers)[jnp.cumsum(keep) - 1]
    return jnp.sum(jnp.where(keep[:, None], terms, jnp.uint32(0)), axis=0, dtype=jnp.uint32)


def answer_text_hash(text: str) -> UInt32[np.ndarray, "2"]:
    """`answer_hash` of a text, on the host: what a gold answer is compared by."""
    total, power = np.zeros(2, np.uint32), np.ones(2, np.uint32)
    for word in text.split():
        value, _ = _hash(_characters(word))
        if value.any() and not (value == _article_hashes()).all(axis=-1).any():
            power = power * _WORD_BASES
            total = total + _mix(value) * power
    return total


def known_words(
    table: TokenHashes,
    words: WordTable,
    tokens: Int[Array, "L"],
    start: Int[Array, ""] | int,
    stop: Int[Array, ""] | int,
    max_words: int,
) -> Int[Array, "W"]:
    """Ids of the first `max_words` words of `tokens[start:stop]` that `words` has, in order; -1 behind the last one."""
    hashes, is_word = word_hashes(table, tokens, start, stop)
    place = jnp.minimum(jnp.searchsorted(words.hashes[:, 0], hashes[:, 0]), words.ids.shape[0] - 1)
    known = is_word & jnp.all(words.hashes[place] == hashes, axis=-1)
    slot = jnp.where(known, jnp.cumsum(known) - 1, max_words)
    return jnp.full(max_words, -1, jnp.int32).at[slot].set(words.ids[place], mode="drop")
