"""Two trainers with models of different sizes: a main one that is paid, and a sub one that is paid as main was."""

import os
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm import train
from jaxrl_llm.distributed import wait_for

STEPS, CALLS = 3, 4


def update(optimizer, state, batch):
    def loss_fn(params):
        hidden = jnp.tanh(batch["inputs"][:, None] * params["in"])
        return jnp.mean((hidden @ params["out"] - batch["rewards"]) ** 2)

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    return train.apply_gradients(state, grads, optimizer, loss)


def train_on(store, key, width, workdir, steps, before=lambda step: None):
    """A small model of `width` that predicts rewards; its batches come from the store."""
    optimizer = train.make_optimizer({"learning_rate": 0.1})

    def init(seed):
        params = {"in": jnp.ones(width), "out": jnp.full(width, 0.1)}
        return train.init_state(params, optimizer, seed)

    def batch(step):
        before(step)
        samples = wait_for(store, key, step, CALLS, timeout=60).samples
        return {
            "inputs": np.array([sample.value["input"] for sample in samples], np.float32),
            "rewards": np.array([sample.reward for sample in samples], np.float32),
        }

    config = {"checkpoint_every": 1}
    with train.RunLog(Path(workdir) / key, config, quiet=True) as log:
        return train.loop(init, partial(update, optimizer), steps=steps, log=log, batch=batch)


def main_trainer(workdir, store):
    """Plays, and pushes what its sub-agent did together with the reward of the whole; waits for the sub-agent's
    count."""

    def play(step):
        for place in range(CALLS):
            reward = float((step + place) % 2)
            store.commit("main", {"input": place}, id=f"{step}-{place}", reward=reward)
            store.commit("sub", {"input": -place, "of": step}, id=f"{step}-{place}", reward=reward)

    state = train_on(store, "main", 3, workdir, STEPS, play)
    counts = wait_for(store, "counts", 0, 1, timeout=60).samples
    return {"width": state.params["in"].shape[0], "sub_updates": counts[0].value}


def sub_trainer(workdir, store):
    """Trains on what was pushed. In its first life, it is killed in the middle."""
    first_life = Path(workdir) / "sub was killed"

    def fall_over(step):
        if step == 2 and not first_life.exists() and os.environ.get("RAY_JOB_ID"):
            first_life.touch()
            os.kill(os.getpid(), 9)

    state = train_on(store, "sub", 5, workdir, STEPS, fall_over)
    store.commit("counts", int(state.step), id="0", reward=0.0)
    return {"width": state.params["in"].shape[0], "killed": first_life.exists()}


def failing_trainer(store):
    raise KeyError("no such model")
