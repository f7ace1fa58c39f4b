"""Whether a trace of tagged blocks follows a grammar, and how well."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class TagGrammar:
    """Which block may follow which.

    Attributes:
      follows: for every tag, and for `"start"`, the tags that may come next; `"end"` among them lets the trace end.

    Raises:
      ValueError: there is no start, or a tag is followed by one that the grammar does not describe.
    """

    follows: Mapping[str, frozenset[str]]

    def __post_init__(self) -> None:
        if "start" not in self.follows:
            raise ValueError(f"follows needs an entry 'start', got {sorted(self.follows)}")
        unknown = frozenset().union(*self.follows.values()) - set(self.follows) - {"end"}
        if unknown:
            raise ValueError(f"tags {sorted(unknown)} may follow but have no entry of their own in follows; add one")

    @property
    def tags(self) -> frozenset[str]:
        return frozenset(self.follows) - {"start"}


SEARCH_R1_GRAMMAR = TagGrammar(
    {
        "start": frozenset({"think"}),
        "think": frozenset({"search", "answer"}),
        "search": frozenset({"information"}),
        "information": frozenset({"think"}),
        "answer": frozenset({"end"}),
    }
)
"""think -> (search -> information -> think)* -> answer (Search-R1's format-aware reward, arXiv 2505.15117)."""

_AFTER_THOUGHT = frozenset({"think", "search", "answer"})
SELF_SEARCH_GRAMMAR = TagGrammar(
    {
        "start": frozenset({"think"}),
        "think": _AFTER_THOUGHT,
        "search": frozenset({"information"}),
        "information": _AFTER_THOUGHT,
        "answer": frozenset({"end"}),
    }
)
"""As Search-R1's, but thoughts may follow each other and need not come after information (SSRL, arXiv 2508.10874)."""
SELF_SEARCH_BLOCKS = ("think", "search", "information", "answer")
_MAX_THOUGHTS = 8


def tag_trace_ok(text: str, grammar: TagGrammar = SEARCH_R1_GRAMMAR) -> bool:
    """Whether `text` is a sequence of closed, unnested blocks in an order that `grammar` allows, with nothing but white
    space between them. `text` is the response alone: policy turns and observations, no prompt."""
    tags = re.compile("<(/?)(" + "|".join(sorted(grammar.tags, key=len, reverse=True)) + ")>")
    before, inside, end = "start", "", 0
    for match in tags.finditer(text):
        closing, tag = match.group(1) == "/", match.group(2)
        if inside:  # only the block's own closing tag may come
            if not closing or tag != inside:
                return False
            before, inside = tag, ""
        else:
            if closing or tag not in grammar.follows[before] or text[end : match.start()].strip():
                return False
            inside = tag
        end = match.end()
    return not inside and "end" in grammar.follows[before] and not text[end:].strip()


def self_search_format_reward(text: str, *, placeholders: Collection[str] = ("query", "...")) -> float:
    """SSRL's format score of a response (arXiv 2508.10874, reference code), in which the policy writes the information
    itself: `min(n_t / 2, 1) * min(n_t, n_s + 1) / max(n_t, n_s + 1)` with n_t thoughts and n_s searches.

    0 where `SELF_SEARCH_GRAMMAR` is broken, any other tag occurs, a block is empty, a search has several lines or is
    one of `placeholders`, or there are more than 8 thoughts. One answer, at the end, and nothing but white space
    between blocks are our reading.
    """
    if set(re.findall(r"</?([A-Za-z][\w-]*)>", text)) - set(SELF_SEARCH_BLOCKS):
        return 0.0
    if not tag_trace_ok(text, SELF_SEARCH_GRAMMAR):
        return 0.0
    blocks = [(tag, content.strip()) for tag, content in re.findall(r"<(\w+)>(.*?)</\1>", text, re.DOTALL)]
    searches = [content for tag, content in blocks if tag == "search"]
    thoughts = sum(tag == "think" for tag, _ in blocks)
    if thoughts > _MAX_THOUGHTS or not all(content for _, content in blocks):
        return 0.0
    if any("\n" in search or search.lower() in placeholders for search in searches):
        return 0.0
    return float(_balance(thoughts, len(searches), np))


def self_search_format_reward_ids(block_types: Int[Array, "B N"], lengths: Int[Array, "B"]) -> Float[Array, "B"]:
    """`self_search_format_reward` of blocks as numbers, for vocabularies whose blocks have no text to look into.

    Args:
      block_types: places in `SELF_SEARCH_BLOCKS`, in order; any other number breaks the format. What lies behind
        `lengths` is not read.
    """
    think, search, information, answer = range(len(SELF_SEARCH_BLOCKS))
    position = jnp.arange(block_types.shape[1])
    kinds = jnp.where(position < lengths[:, None], block_types, -1)
    following = jnp.pad(kinds[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
    last = position == lengths[:, None] - 1
    known = (kinds >= 0) & (kinds < len(SELF_SEARCH_BLOCKS)) | (position >= lengths[:, None])
    ordered = ((kinds == search) == (following == information)) & ((kinds == answer) == last)
    thoughts, searches = (jnp.sum(kinds == kind, axis=1) for kind in (think, search))
    fine = jnp.all(known & ordered, axis=1) & (kinds[:, 0] == think) & (thoughts <= _MAX_THOUGHTS)
    return jnp.where(fine, _balance(thoughts, searches, jnp), 0).astype(jnp.float32)


def _balance(thoughts: Any, searches: Any, xp: ModuleType) -> Any:
    """A thought for every search and one more, and at least two: 1; in numpy or jax.numpy."""
    wanted = searches + 1
    return xp.minimum(thoughts / 2, 1) * xp.minimum(thoughts, wanted) / xp.maximum(thoughts, wanted)
