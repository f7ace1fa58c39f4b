"""A softmax bandit sampled by workers: small enough for tests, with all that a decoupled page has."""

import time

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jaxrl_llm import distributed, ops, train
from jaxrl_llm.types import Rollout

ROWS, ARMS = 8, 4
REWARDS = np.linspace(0, 1, ARMS)


def get_config(arm="small"):
    return ConfigDict(
        {
            "seed": 0,
            "steps": 8,
            "checkpoint_every": 2,
            "keep_checkpoints": 2,
            "sleep": 0.0,  # seconds a rollout, in which weights may change
            "fail_at": -1,  # the rollout of this number raises
            "optimizer": train.optimizer_config(0.1),
            "distributed": distributed.settings(),
        }
    )


def play(params, key, version):
    """Rows of one forced token and one drawn one, which is the arm."""
    logprobs = jax.nn.log_softmax(params["logits"])
    arms = jax.random.categorical(key, logprobs, shape=(ROWS,))
    drawn = jnp.broadcast_to(jnp.array([False, True]), (ROWS, 2))
    rewards = jnp.asarray(REWARDS, jnp.float32)[arms]
    return Rollout(
        tokens=jnp.stack([jnp.zeros_like(arms), arms], axis=1),
        lengths=jnp.full(ROWS, 2),
        prompt_lengths=jnp.full(ROWS, 1),
        mask=drawn,
        logprobs=jnp.where(drawn, logprobs[arms][:, None], 0.0),
        turn_ids=jnp.where(drawn, 0, -1),
        group_ids=jnp.zeros(ROWS, jnp.int32),
        rewards=rewards,
        scorable=jnp.ones(ROWS, bool),
        turn_rewards=rewards[:, None],
        turn_mask=jnp.ones((ROWS, 1), bool),
        truncated=jnp.zeros(ROWS, bool),
        versions=jnp.where(drawn, version, -1),
    )


def make_sample(config):
    def sample(newest, seed, number):
        if number == config.fail_at:
            raise OSError("the environment is down")
        newest()
        time.sleep(config.sleep)
        params, version = newest()  # a long rollout goes on under what came meanwhile
        return play(params, jax.random.fold_in(jax.random.key(seed), number), version)

    return sample


def run(config, log):
    optimizer = train.make_optimizer(config.optimizer)

    def update(state, sampled):
        def loss_fn(params):
            logprobs = jax.nn.log_softmax(params["logits"])[sampled.tokens] * sampled.mask
            weights = ops.importance_weights(
                jax.lax.stop_gradient(logprobs), sampled.logprobs, sampled.mask, cap=config.distributed.importance_cap
            )
            advantages = ops.grpo_advantages(sampled.rewards, sampled.group_ids, sampled.mask)
            now = jax.lax.stop_gradient(logprobs)
            return ops.ppo_clip_loss(logprobs, now, advantages, sampled.mask, weights=weights)[0]

        loss, grads = jax.value_and_grad(loss_fn)(state.params)
        state, metrics = train.apply_gradients(state, grads, optimizer, loss)
        return state, {"loss": loss, "reward": jnp.mean(sampled.rewards), **metrics}

    state = distributed.loop(
        lambda seed: train.init_state({"logits": jnp.zeros(ARMS)}, optimizer, seed),
        update,
        make_sample,
        steps=config.steps,
        log=log,
    )
    log.summary({"logits": [float(value) for value in state.params["logits"]]})
