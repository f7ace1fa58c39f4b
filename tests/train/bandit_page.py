"""A softmax bandit with a warm start: small enough for tests, with all that a page has."""

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jaxrl_llm import train

TABLES = {
    "main": train.Table(
        arms={"trained": {}, "frozen": {"optimizer.learning_rate": 0.0}},
        metric="trained/success",
        metrics=["warm_start.success"],
        seeds=2,
        claims=[train.better("trained", "frozen", by=0.05), train.better("frozen", "trained")],
    )
}


def get_config(arm="small"):
    base = {
        "seed": 0,
        "steps": 10,
        "warm_steps": 4,
        "epochs": 2,
        "arms": 8,
        "width": 16,
        "checkpoint_every": 3,
        "keep_checkpoints": 2,
        "max_skipped_in_row": 3,
        "sleep": 0.0,
        "mesh": {"data": 1, "fsdp": 1},
        "own_rows": False,  # of several processes each draws its own part of a batch
        "nan_from": None,  # steps from which on the loss is NaN
        "optimizer": train.optimizer_config(0.05, warmup_updates=3, schedule="cosine"),
    }
    return train.choose_arm(ConfigDict(base), arm, {"small": {}, "tiny": {"steps": 4}, "big": {"width": 512}})


def policy_logits(params):
    return jnp.tanh(params["embed"]) @ params["head"]


def run(config, log):
    import time

    optimizer = train.make_optimizer(config.optimizer, total_updates=config.steps * config.epochs)
    rewards = jax.nn.sigmoid(jnp.arange(config.arms, dtype=jnp.float32) - 5)

    def init(seed):
        keys = jax.random.split(jax.random.key(seed))
        params = {
            "embed": jax.random.normal(keys[0], (config.width,)),
            "head": 0.1 * jax.random.normal(keys[1], (config.width, config.arms)),
        }
        return train.init_state(params, optimizer, seed)

    def update(state, loss_fn):
        loss, grads = jax.value_and_grad(loss_fn)(state.params)
        state, metrics = train.apply_gradients(state, grads, optimizer, loss)
        return state, {"loss": loss, **metrics}

    def imitate(state, batch):
        return update(state, lambda params: -jnp.mean(jax.nn.log_softmax(policy_logits(params))[batch["actions"]]))

    def reinforce(rewards, state):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(17), state.seed), state.step)
        actions = jax.random.categorical(key, policy_logits(state.params), shape=(64,))
        advantages = rewards[actions] - jnp.mean(rewards[actions])
        old = jax.nn.log_softmax(policy_logits(state.params))[actions]
        bad = config.nan_from is not None and jnp.where(state.step >= config.nan_from, jnp.nan, 0.0)

        def loss_fn(params):
            ratio = jnp.exp(jax.nn.log_softmax(policy_logits(params))[actions] - old)
            clipped = jnp.clip(ratio, 0.8, 1.2)
            return -jnp.mean(jnp.minimum(ratio * advantages, clipped * advantages)) + bad * jnp.sum(params["head"])

        state, stacked = jax.lax.scan(lambda carry, _: update(carry, loss_fn), state, None, length=config.epochs)
        return state, {**train.mean_metrics(stacked), "reward": jnp.mean(rewards[actions]), "tokens": 64}

    def evaluate(state):
        return {"success": jnp.sum(jax.nn.softmax(policy_logits(state.params)) * rewards)}

    def batch(step):
        time.sleep(config.sleep)
        parts = (jax.process_index(), jax.process_count()) if config.own_rows else (0, 1)
        own = slice(parts[0] * 32 // parts[1], (parts[0] + 1) * 32 // parts[1])
        draw = lambda seed: {"actions": np.random.default_rng((seed, step)).integers(3, size=32)[own]}  # noqa: E731
        return train.stack_seeds(config.seed, draw)

    warm = train.loop(
        init,
        imitate,
        steps=config.warm_steps,
        log=log,
        stage="warm_start",
        batch=batch,
        own_rows=config.own_rows,
        evaluate=evaluate,
    )
    state = train.loop(
        lambda seed, warm: train.init_state(warm.params, optimizer, seed, ref_params=warm.params),
        slow(jax.tree_util.Partial(reinforce, rewards), config.sleep),
        steps=config.steps,
        log=log,
        stage="train",
        previous=warm,
        evaluate=evaluate,
        evaluate_every=5,
    )
    success = train.over_seeds(evaluate, config.seed)
    log.summary({"warm_start": success(warm), "trained": success(state)})


def slow(iteration, seconds):
    """The iteration with a pause on the host, so that a test can kill the process between two steps."""
    import time

    if not seconds:
        return iteration

    def wait(_):
        time.sleep(seconds)
        return np.float32(0)

    def call(iteration, state):
        state, metrics = iteration(state)
        return state, {**metrics, "pause": jax.pure_callback(wait, jax.ShapeDtypeStruct((), jnp.float32), state.step)}

    return jax.tree_util.Partial(call, iteration)
