"""Text in, a number out: parsers, format checks and scores of answers."""

from jaxrl_llm.rewards.format import (
    SEARCH_R1_GRAMMAR,
    SELF_SEARCH_BLOCKS,
    SELF_SEARCH_GRAMMAR,
    TagGrammar,
    self_search_format_reward,
    self_search_format_reward_ids,
    tag_trace_ok,
)
from jaxrl_llm.rewards.judges import Judged, judge_by_rubric, revise_rubric
from jaxrl_llm.rewards.maths import boxed_containment_reward, math_equal
from jaxrl_llm.rewards.parse import extract_boxed, extract_tag, extract_tags, parse_action
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
    "Judged",
    "SEARCH_R1_GRAMMAR",
    "SELF_SEARCH_BLOCKS",
    "SELF_SEARCH_GRAMMAR",
    "TagGrammar",
    "boxed_containment_reward",
    "em_format_reward",
    "exact_match",
    "extract_boxed",
    "extract_tag",
    "extract_tags",
    "judge_by_rubric",
    "math_equal",
    "normalize_answer",
    "parse_action",
    "plain_words",
    "retrieval_hit",
    "revise_rubric",
    "self_search_format_reward",
    "self_search_format_reward_ids",
    "substring_match",
    "tag_trace_ok",
    "token_f1",
]
