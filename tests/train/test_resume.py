"""A run that ends at any kind of boundary goes on as if it had not: data order, curriculum, rollouts under way,
accumulated gradients. Real kills are in test_kill.py and in `benchmarks.kill_resume`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.kill_resume import differences
from jaxrl_llm import ops, train
from jaxrl_llm.data.stream import Stream, next_indices, stream_state
from jaxrl_llm.models import DecoderConfig, make_decoder
from jaxrl_llm.sampling import host_rollout, score_rollout
from jaxrl_llm.train.checkpoints import MARKER
from jaxrl_llm.train.host_state import load_host_state, pack, save_host_state, set_damaged_aside, unpack
from tests.sampling.test_host import LETTERS, LIMITS, QUICK, Echo
from tests.sampling.worlds import VOCAB

MODEL = make_decoder(DecoderConfig(VOCAB, width=16, num_layers=1, num_heads=2, num_kv_heads=1, ffn_width=32))
OPTIMIZER = train.make_optimizer(train.optimizer_config(0.01))
STREAM = Stream(range(4), batch_size=2, seed=3)  # an epoch is two batches
STEPS, MICRO_BATCHES = 6, 2


class Crash(Exception):
    pass


class Curriculum:
    """Goes through tasks in the stream's order, and plays again what paid least so far."""

    def __init__(self):
        self.position, self.random, self.paid = stream_state(STREAM), np.random.default_rng(5), []

    def draw(self):
        fresh, self.position = next_indices(STREAM, self.position)
        again = min(self.paid)[1] if self.paid else int(self.random.integers(4))
        return [*fresh.tolist(), again, int(self.random.integers(4))]

    def learn(self, tasks, rewards):
        self.paid += zip(rewards.tolist(), tasks, strict=True)

    def get_state(self):
        return {"position": self.position, "random": self.random.bit_generator.state, "paid": self.paid}

    def set_state(self, state):
        self.position, self.paid = state["position"], [tuple(pair) for pair in state["paid"]]
        self.random.bit_generator.state = state["random"]


def run(workdir, crash_where=None, crash_step=None, *, watched):
    """REINFORCE with rollouts played on the host by the newest weights; raises where it is told to, which it can in an
    accumulation that is watched."""
    curriculum, weights, micro_steps = Curriculum(), [], []

    def crash(where, step):
        if (where, step) == (crash_where, crash_step):
            raise Crash

    def batch(step):
        crash("batch", step)
        asked = []

        def newest():
            asked.append(step)
            if len(asked) == 4:
                crash("rollout", step)
            return weights[-1], step

        tasks = curriculum.draw()
        rollout, _ = host_rollout(
            MODEL, newest, Echo(turns=2), tasks, jax.random.fold_in(jax.random.key(1), step), tokenizer=LETTERS,
            call_limits=QUICK, max_observation=16, steps=2, **LIMITS,
        )  # fmt: skip
        assert len(asked) >= 4
        curriculum.learn(tasks, np.asarray(rollout.rewards))
        return rollout

    def in_micro_batch(step):
        micro_steps.append(int(step))
        if micro_steps.count(int(step)) == MICRO_BATCHES:
            crash("accumulation", int(step))
        return np.float32(0)

    def loss_fn(params, micro):
        logprobs, _ = score_rollout(MODEL, params, micro, decoding=micro.decoding)
        loss = ops.reduce_loss(-logprobs * (micro.rewards[:, None] - 10), micro.mask, agg="token", denominator=1.0)
        step = micro.versions.max()
        pause = jax.pure_callback(in_micro_batch, jax.ShapeDtypeStruct((), jnp.float32), step) if watched else 0.0
        return loss, {"pause": jnp.float32(pause)}

    def iteration(state, rollout):
        loss, grads, metrics = train.accumulate_gradients(loss_fn, state.params, rollout, MICRO_BATCHES, 100.0)
        state, norms = train.apply_gradients(state, grads, OPTIMIZER, loss)
        return state, {"loss": loss, **metrics, **norms}

    with train.RunLog(workdir, {"checkpoint_every": 2}, quiet=True) as log:
        train.loop(
            lambda seed: train.init_state(MODEL.init(jax.random.key(0)), OPTIMIZER, seed),
            iteration,
            steps=STEPS,
            log=log,
            batch=batch,
            publish=lambda step, state: weights.append(jax.device_get(state.params)),
            host=curriculum,
        )
        log.summary({"paid": curriculum.paid})


@pytest.mark.parametrize(
    "places",
    [
        [("rollout", 3)],  # a rollout half played
        # before anything is saved, at the end of an epoch and of a save, in the middle of an epoch, with half a
        # gradient summed, in the last step
        pytest.param(
            [("batch", 0), ("batch", 2), ("batch", 3), ("accumulation", 3), ("rollout", 5)], marks=pytest.mark.slow
        ),
    ],
)
def test_crashes_at_every_kind_of_boundary(tmp_path, places):
    watched = len(places) > 1  # XLA makes another program of it, which is not cached
    run(tmp_path / "whole", watched=watched)
    for where, step in places:
        with pytest.raises((Crash, ValueError, jax.errors.JaxRuntimeError)):
            run(tmp_path / "crashed", where, step, watched=watched)
    run(tmp_path / "crashed", watched=watched)
    assert differences(tmp_path / "whole", tmp_path / "crashed") == []
    stages = [tmp_path / name / "checkpoints" / "train" for name in ("whole", "crashed")]
    for step in (4, STEPS):
        assert pack(load_host_state(stages[0], step)) == pack(load_host_state(stages[1], step))


class Fixed:
    def __init__(self, state):
        self.state = state

    def get_state(self):
        return self.state


def test_a_checkpoint_with_damaged_host_state_is_passed_over(tmp_path):
    for step in (2, 4, 6):
        save_host_state(tmp_path, step, Fixed({"step": step}))
        if step != 4:  # whose checkpoint is still being written when the next host state is saved
            (tmp_path / str(step)).mkdir()
            (tmp_path / str(step) / MARKER).touch()
    assert load_host_state(tmp_path, 4) == {"step": 4}
    damaged = tmp_path / "6.host"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    with pytest.warns(RuntimeWarning, match="6.host is damaged: its checksum differs; trying the one before"):
        set_damaged_aside(tmp_path)
    assert train.finished_steps(tmp_path) == [2] and load_host_state(tmp_path, 2) == {"step": 2}
    (tmp_path / "2.host").unlink()
    with pytest.raises(train.CheckpointError, match=r"has no host state \(.*2.host is missing\)"):
        set_damaged_aside(tmp_path)


def test_host_state_comes_back():
    state = {
        "random": np.random.default_rng(0).bit_generator.state,
        "buffer": [
            {"tokens": np.arange(5, dtype=np.int16), "reward": 0.1},
            {"tokens": np.zeros((0, 2)), "reward": None},
        ],
        "count": np.int32(7),
        "name": "größer",
    }
    found = unpack(pack(state))
    assert found["random"] == state["random"] and found["name"] == state["name"] and found["count"] == 7
    for old, new in zip(state["buffer"], found["buffer"], strict=True):
        assert (new["tokens"].dtype, new["reward"]) == (old["tokens"].dtype, old["reward"])
        np.testing.assert_array_equal(old["tokens"], new["tokens"])
    with pytest.raises(TypeError, match="host state must be dicts, lists, text, numbers and arrays, got object"):
        pack({"env": object()})
