"""The definitions once more, in plain Python and float64, one loop per sum: what the ops are compared with.

Float32 resolves 6e-8; the sums are of at most 30 terms of size one, so TOLERANCE leaves room for exp and for division
by a small std, and for nothing else.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

import jaxrl_llm.ops

TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}
B, T, K, V = 5, 6, 3, 4
RNG = np.random.default_rng(3)
MASK = np.array(
    [[0, 1, 1, 0, 1, 0], [1, 1, 0, 0, 1, 1], [0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 0, 1], [1, 1, 1, 1, 1, 1]], bool
)
X, WEIGHTS, VALUES = RNG.normal(size=(B, T)), RNG.uniform(0.5, 2, (B, T)), RNG.normal(size=(B, T))
LOGPROBS = -RNG.uniform(0.1, 3, (B, T))
OLD = LOGPROBS + 0.25 * RNG.normal(size=(B, T))
ADVANTAGES = RNG.normal(size=(B, T))
REWARDS, IDS = RNG.normal(size=B), np.array([4, 4, 4, -3, -3])
TURN_IDS = np.array(
    [[-1, 0, 0, -1, 1, -1], [0, 0, -1, -1, 1, 2], [-1, -1, 0, 0, -1, -1], [-1] * 5 + [0], [0, 0, 1, 1, 2, 2]]
)
TURN_MASK = np.array([[1, 1, 0], [1, 1, 1], [1, 0, 0], [1, 0, 0], [1, 1, 1]], bool)
TURN_REWARDS = RNG.normal(size=(B, K))
ROLLOUTS = np.array([0, 0, 1, 2, 2])
AGGREGATIONS = [
    ("token", {}),
    ("seq", {}),
    ("seq_sum", {}),
    ("const", {"max_len": 7}),
    ("rollout", {"rollout_ids": ROLLOUTS}),
]


def quick_jit(function):
    """jit without XLA's optimizations: hundreds of functions are compiled here, each to run on a few numbers."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


class Jitted:
    """The ops, each call compiled as a whole: called eagerly, every small step of an op is compiled by itself."""

    def __getattr__(self, name):
        op = getattr(jaxrl_llm.ops, name)
        return lambda *arrays, **options: quick_jit(lambda *arrays: op(*arrays, **options))(*arrays)


JITTED = Jitted()


def array(*values):
    return jnp.array(values, jnp.float32)


def check(actual, expected, **tolerance):
    """Against literals of six decimals, unless a tolerance is given."""
    np.testing.assert_allclose(actual, expected, **(tolerance or {"rtol": 0, "atol": 2e-6}))


def compare(function, oracle, *points, cotangent=None):
    """Values at `points`, then the gradient with respect to each, of the dot product with a fixed cotangent."""
    expected = np.asarray(oracle(*points))
    weights = np.random.default_rng(0).normal(size=expected.shape) if cotangent is None else cotangent

    def total(*xs):
        value = function(*xs)
        return jnp.sum(value * weights), value

    graded = quick_jit(jax.value_and_grad(total, argnums=tuple(range(len(points))), has_aux=True))
    (_, value), gradients = graded(*(jnp.asarray(point, jnp.float32) for point in points))
    np.testing.assert_allclose(value, expected, **TOLERANCE)
    for place, gradient in enumerate(gradients):

        def moved(x, place=place):
            return np.sum(np.asarray(oracle(*points[:place], x, *points[place + 1 :])) * weights)

        np.testing.assert_allclose(gradient, numerical_gradient(moved, points[place]), **TOLERANCE)


def numerical_gradient(function, x, step=1e-5):
    """Central differences in float64: error about step^2 of a smooth function, far below what float32 resolves."""
    x = np.array(x, np.float64)
    gradient = np.zeros_like(x)
    for index in np.ndindex(*x.shape):
        up, down = x.copy(), x.copy()
        up[index] += step
        down[index] -= step
        gradient[index] = (function(up) - function(down)) / (2 * step)
    return gradient


def true_entries(mask):
    return [tuple(index) for index in np.argwhere(mask)]


def mean(values):
    values = list(values)
    return sum(values) / len(values) if values else 0.0


def variance(values, ddof=1):
    values = list(values)
    if len(values) <= ddof:
        return 0.0
    center = mean(values)
    return sum((v - center) ** 2 for v in values) / (len(values) - ddof)


def aggregate(x, mask, agg="token", max_len=None, rollout_ids=None):
    """(numerator, denominator)"""
    rows = [[x[b, t] for t in range(mask.shape[1]) if mask[b, t]] for b in range(mask.shape[0])]
    filled = [row for row in rows if row]
    total = sum(sum(row) for row in rows)
    if agg == "token":
        return total, sum(len(row) for row in rows)
    if agg == "seq":
        return sum(mean(row) for row in filled), len(filled)
    if agg == "seq_sum":
        return total, len(filled)
    if agg == "const":
        return total, len(rows) * max_len
    pieces = {
        r: sum((row for row, owner in zip(rows, rollout_ids, strict=True) if owner == r), []) for r in {*rollout_ids}
    }
    return sum(mean(piece) for piece in pieces.values()), sum(bool(piece) for piece in pieces.values())


def loss(x, mask, weights=None, **options):
    numerator, denominator = aggregate(x if weights is None else x * weights, mask, **options)
    return numerator / denominator if denominator else 0.0


def group_normalize(
    x, ids, valid=None, center="group", scale="group", std_of="raw", ddof=1, eps=1e-6, var_eps=0.0, singleton="zero"
):
    n = len(x)
    valid = [True] * n if valid is None else valid
    everyone = [i for i in range(n) if valid[i]]
    group = {i: [j for j in everyone if ids[j] == ids[i]] for i in everyone}
    centered, result = np.zeros(n), np.zeros(n)
    for i in everyone:
        members = everyone if center == "batch" else group[i]
        alone = len(members) == 1 and center != "batch"
        if center == "none" or (alone and singleton == "raw"):
            centered[i] = x[i]
        elif len({x[j] for j in members}) == 1:
            centered[i] = 0
        elif center == "leave_one_out":
            centered[i] = x[i] - mean(x[j] for j in members if j != i)
        else:
            centered[i] = x[i] - mean(x[j] for j in members)
    for i in everyone:
        if scale == "none":
            result[i] = centered[i]
            continue
        members = everyone if scale == "batch" else group[i]
        basis = x if std_of == "raw" else centered
        if len(members) == 1 and scale == "group" and singleton == "raw":
            result[i] = centered[i] / (1 + eps)
        elif len({basis[j] for j in members}) > 1:
            result[i] = centered[i] / (math.sqrt(variance((basis[j] for j in members), ddof) + var_eps) + eps)
    return result


def whiten(x, mask, ids=None, ddof=1, eps=1e-8, eps_in="var"):
    result = np.zeros(x.shape)
    for index in true_entries(mask):
        same = [x[j] for j in true_entries(mask) if ids is None or ids[j[0]] == ids[index[0]]]
        spread = variance(same, ddof)
        std = math.sqrt(spread + eps) if eps_in == "var" else math.sqrt(spread) + eps
        result[index] = (x[index] - mean(same)) / std
    return result


def actions(row):
    return [t for t in range(len(row)) if row[t]]


def discounted_sum(x, mask, decay, on_masked="skip"):
    """`decay` [B, T]. A row's actions alone are summed; "reset" starts again at each gap."""
    result = np.zeros(x.shape)
    for b, row in enumerate(mask):
        steps = actions(row)
        for i in range(len(steps) - 1, -1, -1):
            t, later = steps[i], steps[i + 1] if i + 1 < len(steps) else None
            reaches = later is not None and (on_masked == "skip" or later == t + 1)
            result[b, t] = x[b, t] + (decay[b, t] * result[b, later] if reaches else 0)
    return result


def gae(rewards, values, mask, gamma, lam, discounts=None, bootstrap=None):
    result = np.zeros(rewards.shape)
    for b, row in enumerate(mask):
        steps, advantage, next_value = actions(row), 0.0, 0.0 if bootstrap is None else bootstrap[b]
        for t in reversed(steps):
            discount = gamma * (1 if discounts is None else discounts[b, t])
            advantage = rewards[b, t] + discount * next_value - values[b, t] + discount * lam * advantage
            result[b, t], next_value = advantage, values[b, t]
    return result


def vtrace(rewards, values, discounts, ratios, mask, bootstrap, rho_max, c_max):
    """(targets, advantages)"""
    targets, advantages = np.zeros(rewards.shape), np.zeros(rewards.shape)
    for b, row in enumerate(mask):
        next_value = next_target = bootstrap[b]
        for t in reversed(actions(row)):
            rho, c = min(rho_max, ratios[b, t]), min(c_max, ratios[b, t])
            delta = rho * (rewards[b, t] + discounts[b, t] * next_value - values[b, t])
            advantages[b, t] = rho * (rewards[b, t] + discounts[b, t] * next_target - values[b, t])
            targets[b, t] = values[b, t] + delta + discounts[b, t] * c * (next_target - next_value)
            next_value, next_target = values[b, t], targets[b, t]
    return targets, advantages


def by_turn(turn_values, turn_ids):
    return np.array([[turn_values[b, k] if k >= 0 else 0.0 for k in row] for b, row in enumerate(turn_ids)])


def dual_level(turn_rewards, turn_mask, turn_ids, group_ids, gamma=0.9, weight=0.5):
    returns = discounted_sum(turn_rewards, turn_mask, np.full(turn_mask.shape, gamma))
    total = np.array([sum(turn_rewards[b, k] for k in actions(row)) for b, row in enumerate(turn_mask)])
    trajectory = group_normalize(total, group_ids, singleton="raw")
    turn = np.stack(
        [
            group_normalize(returns[:, k], group_ids, turn_mask[:, k], singleton="raw")
            for k in range(turn_mask.shape[1])
        ],
        axis=1,
    )
    return by_turn(weight * trajectory[:, None] + (1 - weight) * turn, turn_ids)


def prime(
    process,
    rewards,
    mask,
    group_ids,
    gamma_process=1.0,
    gamma_outcome=1.0,
    process_weight=1.0,
    outcome_weight=1.0,
    loo="paper",
):
    size = len(rewards)
    own = [mean(process[b, t] for t in actions(mask[b])) for b in range(size)]
    source, outcome = np.zeros(mask.shape), np.zeros(mask.shape)
    for b in range(size):
        others = [j for j in range(size) if group_ids[j] == group_ids[b] and j != b]
        for t in actions(mask[b]):
            if loo == "paper":
                source[b, t] = process[b, t] - mean(own[j] for j in others)
            else:
                n = len(others) + 1
                source[b, t] = process[b, t] * n / (n - 1) - (own[b] + sum(own[j] for j in others)) / (n - 1)
        outcome[b, actions(mask[b])[-1]] = rewards[b] - mean(rewards[j] for j in others)
    returns = process_weight * discounted_sum(
        source, mask, np.full(mask.shape, gamma_process)
    ) + outcome_weight * discounted_sum(outcome, mask, np.full(mask.shape, gamma_outcome))
    return whiten(returns, mask)


def ppo_tokens(logprobs, old, advantages, low=0.2, high=0.2, dual_clip=None, ratio_max=math.inf):
    result = np.zeros(logprobs.shape)
    for i in np.ndindex(*logprobs.shape):
        ratio, a = math.exp(logprobs[i] - old[i]), advantages[i]
        result[i] = max(-min(ratio, ratio_max) * a, -min(max(ratio, 1 - low), 1 + high) * a)
        if dual_clip is not None and a < 0:
            result[i] = min(result[i], -dual_clip * a)
    return result


def gspo_tokens(logprobs, old, advantages, mask, low, high):
    result = np.zeros(logprobs.shape)
    for b, row in enumerate(mask):
        ratio = math.exp(mean(logprobs[b, t] - old[b, t] for t in actions(row)))
        for t in actions(row):
            result[b, t] = max(-ratio * advantages[b, t], -min(max(ratio, 1 - low), 1 + high) * advantages[b, t])
    return result


def shape_ratio(ratio, mask, strategy="percentile", value=0.9, offsets=None):
    """`offsets` [B]: the constants of the sequences, where they must not move with the ratio."""
    result = np.zeros(ratio.shape)
    offsets = shape_offsets(ratio, mask, strategy, value) if offsets is None else offsets
    for b, t in true_entries(mask):
        result[b, t] = ratio[b, t] ** value if strategy == "power" else ratio[b, t] / (ratio[b, t] + offsets[b])
    return result


def shape_offsets(ratio, mask, strategy, value):
    if strategy != "percentile":
        return [value] * len(mask)
    return [max(np.quantile(ratio[b][row], value), 1e-4) if row.any() else 1.0 for b, row in enumerate(mask)]


def mirror_descent(seq, ref, rewards, group_ids, tau, form, baseline):
    terms = []
    for i in range(len(seq)):
        group = [rewards[j] for j in range(len(seq)) if group_ids[j] == group_ids[i]]
        base = mean(group) if baseline == "mean" else tau * math.log(mean(math.exp(r / tau) for r in group))
        d = seq[i] - ref[i]
        terms.append(
            (rewards[i] - base - tau * d) ** 2 if form == "squared" else -(rewards[i] - base) * seq[i] + tau / 2 * d**2
        )
    return mean(terms)


def log_softmax(logits):
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
