"""Everything the algorithms are made of: pure functions of arrays, safe under jit, vmap and grad.

Axis letters are those of `jaxrl_llm.types`. Options are keyword-only and static. Values under a false mask are never
read, reductions are in float32, an empty mask gives 0, and a loss returns (float32 scalar, metrics).
"""

from jaxrl_llm.ops.advantages import (
    dual_level_advantages,
    group_relative_advantages,
    grpo_advantages,
    prime_advantages,
    reinforce_pp_advantages,
    remax_advantages,
    rloo_advantages,
    turn_advantages,
)
from jaxrl_llm.ops.divergences import (
    categorical_kl,
    jensen_shannon,
    kl_estimate,
    symmetric_kl,
    token_entropy,
    update_kl_coefficient,
)
from jaxrl_llm.ops.groups import (
    first_occurrence_mask,
    group_normalize,
    group_stats,
    informative_group_scale,
    masked_whiten,
    segment_reduce,
)
from jaxrl_llm.ops.logits import masked_log_softmax, nucleus_mask, top_k_mask
from jaxrl_llm.ops.logprobs import token_logprobs
from jaxrl_llm.ops.masked import (
    Aggregation,
    Moments,
    aggregate_loss,
    loss_denominator,
    masked_mean,
    masked_softmax,
    masked_sum,
    masked_var,
    reduce_loss,
    sequence_log_ratio,
    sequence_logprob,
    update_moments,
)
from jaxrl_llm.ops.matching import box_iou, exact_match_ids, fbeta, set_fscore, token_f1_ids
from jaxrl_llm.ops.meta import interpolate_params, project_conflicting_grads
from jaxrl_llm.ops.policy_losses import (
    cispo_loss,
    gspo_loss,
    importance_weights,
    mirror_descent_loss,
    ppo_clip_loss,
    reinforce_loss,
    shape_ratio,
)
from jaxrl_llm.ops.preference import PairStats, dpo_loss, pair_margins, pairwise_logistic_loss
from jaxrl_llm.ops.returns import (
    discounted_returns,
    gae_advantages,
    kl_shaped_rewards,
    next_values,
    reverse_discounted_sum,
    vtrace_advantages,
    vtrace_targets,
)
from jaxrl_llm.ops.selection import (
    best_worst_pairs,
    dynamic_sampling_mask,
    pass_rate_mask,
    resample_indices,
    reward_filter_weights,
    score_probs,
    shortest_correct,
    top_fraction_mask,
    top_k_select,
)
from jaxrl_llm.ops.shaping import (
    combine_rewards,
    format_gated_rewards,
    group_length_rewards,
    overlong_penalty,
    progress_rewards,
    repetition_scores,
)
from jaxrl_llm.ops.supervised_losses import sft_loss, token_cross_entropy, value_loss
from jaxrl_llm.ops.trees import (
    branch_node_mask,
    choose_branch,
    semantic_branch_scores,
    tree_segment_advantages,
)
from jaxrl_llm.ops.turns import add_outcome, broadcast_values, last_turn_mask, place_turn_rewards
from jaxrl_llm.ops.voting import (
    best_of_k_value,
    elo_ratings,
    elo_update,
    pass_at_k,
    signal_probability,
    weighted_vote,
    win_rate,
)

__all__ = [
    # reductions over masked tokens
    "masked_sum",
    "masked_mean",
    "masked_var",
    "masked_softmax",
    "sequence_logprob",
    "sequence_log_ratio",
    "Moments",
    "update_moments",
    # which mean a loss takes
    "Aggregation",
    "aggregate_loss",
    "loss_denominator",
    "reduce_loss",
    # groups
    "segment_reduce",
    "group_stats",
    "group_normalize",
    "masked_whiten",
    "informative_group_scale",
    "first_occurrence_mask",
    # turns and tokens
    "broadcast_values",
    "place_turn_rewards",
    "last_turn_mask",
    "add_outcome",
    # returns
    "reverse_discounted_sum",
    "discounted_returns",
    "next_values",
    "gae_advantages",
    "vtrace_targets",
    "vtrace_advantages",
    "kl_shaped_rewards",
    # advantages
    "group_relative_advantages",
    "grpo_advantages",
    "rloo_advantages",
    "remax_advantages",
    "reinforce_pp_advantages",
    "turn_advantages",
    "dual_level_advantages",
    "prime_advantages",
    # losses of the policy
    "ppo_clip_loss",
    "gspo_loss",
    "cispo_loss",
    "reinforce_loss",
    "importance_weights",
    "shape_ratio",
    "mirror_descent_loss",
    # losses towards targets
    "value_loss",
    "sft_loss",
    "token_cross_entropy",
    # losses of pairs
    "PairStats",
    "dpo_loss",
    "pair_margins",
    "pairwise_logistic_loss",
    # log-probs from hidden states
    "token_logprobs",
    # entropies and divergences
    "token_entropy",
    "kl_estimate",
    "update_kl_coefficient",
    "categorical_kl",
    "symmetric_kl",
    "jensen_shannon",
    # tokens that a policy may choose from
    "masked_log_softmax",
    "nucleus_mask",
    "top_k_mask",
    # trees of parameters and of gradients
    "interpolate_params",
    "project_conflicting_grads",
    # trees of rollouts
    "branch_node_mask",
    "choose_branch",
    "semantic_branch_scores",
    "tree_segment_advantages",
    # overlap of sets, answers and boxes
    "box_iou",
    "exact_match_ids",
    "fbeta",
    "set_fscore",
    "token_f1_ids",
    # rewards from terms
    "combine_rewards",
    "format_gated_rewards",
    "group_length_rewards",
    "overlong_penalty",
    "progress_rewards",
    "repetition_scores",
    # which samples to train on
    "best_worst_pairs",
    "dynamic_sampling_mask",
    "pass_rate_mask",
    "resample_indices",
    "reward_filter_weights",
    "score_probs",
    "shortest_correct",
    "top_fraction_mask",
    "top_k_select",
    # one answer from many, chances, tournaments
    "best_of_k_value",
    "elo_ratings",
    "elo_update",
    "pass_at_k",
    "signal_probability",
    "weighted_vote",
    "win_rate",
]
