"""From parameters and prompts to rollouts, and back to their log-probabilities."""

from jaxrl_llm.sampling.agents import agents_rollout
from jaxrl_llm.sampling.branches import BegunEnv, branching_rollout
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
from jaxrl_llm.sampling.host import Context, NewContext, host_rollout
from jaxrl_llm.sampling.moves import Episode, Fork, Move, Role
from jaxrl_llm.sampling.pieces import Event, Piece, reset_context, should_summarize, split_on_summary
from jaxrl_llm.sampling.planning import Position, TurnSearch, first_positions, play_turn, sample_turns, turn_search
from jaxrl_llm.sampling.prefixes import PartialRolloutBuffer, Prefix, ResumedEnv, resume_tasks
from jaxrl_llm.sampling.rows import Row, join_rollouts, rows_to_rollout
from jaxrl_llm.sampling.score import as_rollout, replace_prompts, rollout_hidden, score_rollout
from jaxrl_llm.sampling.search import Beams, Vote, beam_search, best_of_n, self_consistency
from jaxrl_llm.sampling.server import PolicyServer, Reply
from jaxrl_llm.sampling.session import Session
from jaxrl_llm.sampling.transcripts import rollout_spans, transcripts, write_transcripts
from jaxrl_llm.sampling.trees import (
    own_mask,
    path_weights,
    random_positions,
    split_evenly,
    surprising_positions,
    tree_rollout,
    turn_starts,
    uncertain,
    unsolved,
)

__all__ = [
    "Beams",
    "BegunEnv",
    "CallLimits",
    "Constraint",
    "Context",
    "Episode",
    "Event",
    "Fork",
    "Move",
    "NewContext",
    "PartialRolloutBuffer",
    "Piece",
    "PolicyServer",
    "Position",
    "Prefix",
    "Reply",
    "ResumedEnv",
    "Role",
    "Row",
    "Session",
    "TurnSearch",
    "Vote",
    "agents_rollout",
    "allowed_tokens",
    "beam_search",
    "best_of_n",
    "branching_rollout",
    "constrain",
    "first_positions",
    "host_rollout",
    "join_rollouts",
    "json_schema_automaton",
    "next_states",
    "own_mask",
    "path_weights",
    "play_turn",
    "random_positions",
    "regex_automaton",
    "resume_tasks",
    "rollout",
    "rollout_hidden",
    "rollout_spans",
    "rows_to_rollout",
    "sample_turns",
    "as_rollout",
    "replace_prompts",
    "reset_context",
    "score_rollout",
    "self_consistency",
    "should_summarize",
    "split_evenly",
    "split_on_summary",
    "start_states",
    "surprising_positions",
    "token_trie",
    "transcripts",
    "tree_rollout",
    "turn_search",
    "turn_starts",
    "uncertain",
    "unsolved",
    "write_transcripts",
]
