"""From parameters and prompts to rollouts, and back to their log-probabilities."""

from jaxrl_llm.sampling.calls import CallLimits
from jaxrl_llm.sampling.constraints import (
    Constraint,
    allowed_tokens,
    constrain,
    next_states,
    start_states,
    token_trie,
)
from jaxrl_llm.sampling.device import rollout
from jaxrl_llm.sampling.grammars import json_schema_automaton, regex_automaton
from jaxrl_llm.sampling.host import Episode, host_rollout
from jaxrl_llm.sampling.score import rollout_hidden, score_rollout
from jaxrl_llm.sampling.transcripts import rollout_spans, transcripts, write_transcripts

__all__ = [
    "CallLimits",
    "Constraint",
    "Episode",
    "allowed_tokens",
    "constrain",
    "host_rollout",
    "json_schema_automaton",
    "next_states",
    "regex_automaton",
    "rollout",
    "rollout_hidden",
    "rollout_spans",
    "score_rollout",
    "start_states",
    "token_trie",
    "transcripts",
    "write_transcripts",
]
