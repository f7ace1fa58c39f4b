"""Token automata of regular expressions and JSON schemas, which `outlines_core` compiles on the host.

It turns a schema into a regular expression and that into an automaton over the tokens' bytes. The result goes to the
device whole, so that a step asks the host nothing; a state within a string has an edge for nearly every token of the
vocabulary, 8 bytes each.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import outlines_core

from jaxrl_llm.models.tokenizer import Tokenizer, token_bytes
from jaxrl_llm.sampling.constraints import Automaton, close_automaton

# What of JSON Schema `outlines_core` enforces. It passes over the rest in silence, or reads it in its own way: `oneOf`
# like `anyOf`, `allOf` as one value behind the other.
ENFORCED = {
    *("type", "properties", "required", "additionalProperties", "items", "prefixItems", "minItems", "maxItems"),
    *("minLength", "maxLength", "pattern", "format", "enum", "const", "anyOf", "$ref", "$defs", "definitions"),
}
NOTES = {"title", "description", "default", "examples", "deprecated", "$schema", "$id", "$comment"}


def regex_automaton(pattern: str, tokenizer: Tokenizer, *, end: Sequence[int] | None = None) -> Automaton:
    """The automaton that writes a text which the whole of `pattern` matches, in any tokens that spell it.

    Args:
      pattern: in the syntax of Rust's `regex`: no look-around, no references back. Characters are those of UTF-8, also
        where their bytes come in several tokens.
      tokenizer: byte-level BPE or SentencePiece. Special tokens are not text and never match.
      end: tokens of which one closes the text; default: the tokenizer's `eos_ids`. With `()` the policy is free again
        once the pattern is complete, which must then be where nothing more can follow.

    Raises:
      ValueError: `outlines_core` refuses the pattern, no tokens spell it, or, without an end token, it can be complete
        and go on.
    """
    end = tokenizer.eos_ids if end is None else end
    spelled: dict[bytes | str, list[int]] = {}
    for i, text in enumerate(token_bytes(tokenizer)):
        if text:
            spelled.setdefault(text, []).append(i)
    own_end = tokenizer.vocab_size  # the package wants a token of its own for the end; no token of ours has this id
    index = outlines_core.Index(pattern, outlines_core.Vocabulary(own_end, spelled))
    edges = index.get_transitions()  # by state, then token
    sources = np.repeat(list(edges), [len(targets) for targets in edges.values()])
    tokens = np.fromiter((token for targets in edges.values() for token in targets), int)
    targets = np.fromiter((target for targets in edges.values() for target in targets.values()), int)
    sources, tokens, targets = (x[tokens != own_end] for x in (sources, tokens, targets))
    # the package's numbers of states have gaps: the first state gets 0, the others what follows
    first, final = index.get_initial_state(), list(index.get_final_states())
    _, numbers = np.unique(np.concatenate([[first], sources, targets, final]), return_inverse=True)
    numbers = np.where(numbers == numbers[0], 0, numbers + (numbers < numbers[0]))
    _, sources, targets, last = np.split(numbers, np.cumsum([1, len(sources), len(targets)]))
    return close_automaton(sources, tokens, targets, last, end)


def json_schema_automaton(
    schema: Mapping[str, Any],
    tokenizer: Tokenizer,
    *,
    end: Sequence[int] | None = None,
    whitespace: str | None = None,
) -> Automaton:
    """The automaton that writes JSON of a schema, members of an object in the schema's order.

    Args:
      schema: as a dict. An unbounded string or array is a loop of few states, one with `maxLength` a state per
        character: with a large vocabulary bounds cost memory, and seconds to compile. Of lengths and a pattern for one
        string only the pattern holds.
      tokenizer, end: as for `regex_automaton`.
      whitespace: a pattern of what may stand between parts; default: at most one space. `""` allows none.

    Raises:
      ValueError: a keyword that would not be enforced, or what `outlines_core` refuses, such as a `$ref` into itself.
    """
    _check_keywords(schema)
    pattern = outlines_core.json_schema.build_regex_from_schema(json.dumps(schema), whitespace)
    return regex_automaton(pattern, tokenizer, end=end)


def _check_keywords(schema: Any) -> None:
    """Raises ValueError for a keyword that the output need not obey."""
    if isinstance(schema, list):
        for part in schema:
            _check_keywords(part)
    if not isinstance(schema, Mapping):
        return
    for keyword, value in schema.items():
        if keyword not in ENFORCED | NOTES:
            raise ValueError(
                f"{keyword!r} of a JSON schema is not enforced while decoding; leave it out and check the value "
                f"afterwards. Enforced are {', '.join(sorted(ENFORCED))}"
            )
        if keyword in ("properties", "$defs", "definitions"):
            _check_keywords(list(value.values()))
        elif keyword not in {"enum", "const"} | NOTES:
            _check_keywords(value)
