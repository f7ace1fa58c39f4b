"""From parameters and prompts to rollouts, and back to their log-probabilities."""

from jaxrl_llm.sampling.device import rollout
from jaxrl_llm.sampling.score import rollout_hidden, score_rollout

__all__ = ["rollout", "rollout_hidden", "score_rollout"]
