"""Text in, a number out: parsers, format checks and scores of answers."""

from jaxrl_llm.rewards.format import SEARCH_R1_GRAMMAR, TagGrammar, tag_trace_ok
from jaxrl_llm.rewards.parse import extract_tag, extract_tags, parse_action
from jaxrl_llm.rewards.qa import (
    em_format_reward,
    exact_match,
    normalize_answer,
    plain_words,
    retrieval_hit,
    substring_match,
    token_f1,
)

__all__ = [
    "SEARCH_R1_GRAMMAR",
    "TagGrammar",
    "em_format_reward",
    "exact_match",
    "extract_tag",
    "extract_tags",
    "normalize_answer",
    "parse_action",
    "plain_words",
    "retrieval_hit",
    "substring_match",
    "tag_trace_ok",
    "token_f1",
]
