"""GSM8K: GRPO on word problems, from a checkpoint of the hub with its chat template, scored by the maths verifier.

The page for data and a model of one's own. A problem becomes a user's message in the chat template of the checkpoint's
tokenizer; a group of answers is sampled against the host; `rewards.math_equal` compares each with the number behind the
`####` of the worked answer, which is all that is paid for; and GRPO (see `baselines`) updates. The policy is written to
`policy` in the work directory, as transformers and vLLM read it, and answers to the test problems to `rollouts.jsonl`.

    python -m experiments.run --config=gsm8k:paper --workdir=out/gsm8k
    python -m experiments.run --config=gsm8k:paper --config.checkpoint=Qwen/Qwen2.5-0.5B-Instruct --workdir=out/gsm8k \\
        --config.train_data=train.jsonl --config.test_data=test.jsonl --config.prompts=64 --config.micro_batches=10

Without a checkpoint (arms `small` and `tiny`) a small policy is made here, with byte pairs of the problems for a
tokenizer, and first imitates worked answers. It has 84 of the 8,792 problems, and two layers cannot do arithmetic on
words: its table shows that the path learns the problems that it trains on, and nothing about others.
"""

from __future__ import annotations

import dataclasses
import re
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import tokenizers
from ml_collections import ConfigDict
from tokenizers.pre_tokenizers import ByteLevel

from experiments.policy_optimization._training import (
    describe_rollout,
    init_policy,
    make_clip_step,
    make_optimizer,
    score,
    step_programs,
)
from jaxrl_llm import data, distributed, envs, models, ops, rewards, sampling, train
from jaxrl_llm.data.columns import Row
from jaxrl_llm.distributed.source import Newest
from jaxrl_llm.models.tokenizer import wrap_tokenizer
from jaxrl_llm.types import Batch, Decoding, Metrics, Params, Rollout, TrainState

KIND = "pipeline"
NEEDS_SCALE = ("held-out accuracy, which takes a policy that has read more than 64 problems",)
SAMPLE = Path(data.__file__).with_name("gsm8k")
INSTRUCTION = "Solve the problem step by step. Write #### and the final number at the end."
TEMPLATE = (  # of a policy made here: messages between the marks that Qwen's models know
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class Setup(NamedTuple):
    """The policy, what it plays against, and the problems: `prompt`, `answers`, and the `worked` answer."""

    model: models.Model
    env: envs.ToolEnv
    train: data.Records
    test: data.Records


def read_problems(config: ConfigDict, split: str) -> data.Records:
    """From a file, a folder or a hub id with GSM8K's columns; the final number is behind the worked answer's `####`."""

    def convert(row: Row) -> Row:
        worked = re.sub("<<.*?>>", "", row["answer"])  # calls of a calculator, which no policy here has
        return {"prompt": row["question"], "answers": [worked.rpartition("####")[2].strip()], "worked": worked}

    source = Path(config[f"{split}_data"] or SAMPLE / f"{split}.jsonl")
    where = {} if source.is_file() else {"split": split, "config": config.data_config}
    return data.read_records(source, "question_answer", convert=convert, **where)


def ask(problem: Row) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"{problem['prompt']}\n\n{INSTRUCTION}"}]


def reward(episode: envs.Trajectory) -> float:
    return rewards.math_equal(episode.answer or "", episode.task["answers"])


def load_policy(config: ConfigDict, problems: data.Records) -> models.Model:
    """The checkpoint; or a policy of the config's sizes that knows nothing, and a tokenizer trained on the problems."""
    if config.checkpoint:
        return models.load(config.checkpoint, dtype=jnp.dtype(config.dtype))
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer, backend.decoder = ByteLevel(add_prefix_space=False), tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=config.vocab_size - 2, initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator([f"{ask(row)[0]['content']}\n{row['worked']}" for row in problems], trainer)
    marks = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    tokenizer = dataclasses.replace(wrap_tokenizer(backend, marks), chat_template=TEMPLATE)
    model = models.make_decoder(models.DecoderConfig(tokenizer.vocab_size, **config.model))
    return dataclasses.replace(model, tokenizer=tokenizer, params=model.init(jax.random.key(0)))


def make_setup(config: ConfigDict) -> Setup:
    problems = read_problems(config, "train")
    model = load_policy(config, problems)
    env = envs.ToolEnv(protocol=envs.CHAT, tokenizer=model.tokenizer, ask=ask, reward=reward)
    return Setup(model, env, problems, read_problems(config, "test"))


def warm_start(config: ConfigDict, setup: Setup, log: train.RunLog) -> Params:
    """The parameters to start from: the model's, after `config.warm_start.steps` updates on worked answers."""
    warm, model = config.warm_start, setup.model
    if not warm.steps:
        return model.params
    chats = [{"messages": [*ask(row), {"role": "assistant", "content": row["worked"]}]} for row in setup.train]
    shown = data.tokenize_demonstrations(
        data.Records("language_modeling", chats), model.tokenizer, end_id=None, max_length=config.max_length
    )
    packed = data.pack_best_fit(*shown[:3], row_length=config.max_length)
    rows = {name: array for name, array in packed.items() if array.ndim}
    stream = data.Stream(range(len(rows["tokens"])), warm.rows, seed=warm.seed)
    optimizer = train.make_optimizer(warm.optimizer, total_updates=warm.steps)

    def batch(step: int) -> dict[str, Any]:
        chosen, _ = data.next_indices(stream, data.state_at(stream, step))
        return {name: array[chosen] for name, array in rows.items()}

    init = jax.tree_util.Partial(lambda params, seed: train.init_state(params, optimizer, seed), model.params)
    step = train.make_sft_step(model, optimizer)
    return train.loop(init, step, steps=warm.steps, log=log, stage="warm_start", batch=batch).params


def play(
    config: ConfigDict, setup: Setup, params: Any, problems: list[Row], key: jax.Array, group_size: int
) -> Rollout:
    """`group_size` answers to each problem."""
    return sampling.host_rollout(
        setup.model,
        params,
        setup.env,
        problems,
        key,
        tokenizer=setup.model.tokenizer,
        max_length=config.max_length,
        max_turns=config.max_turns,
        max_turn_tokens=config.max_turn_tokens,
        stop_sequences=setup.env.stop_sequences,
        decoding=Decoding(**config.decoding),
        group_size=group_size,
        num_slots=config.num_slots,
        session_options={"cache_dtype": jnp.dtype(config.dtype)},
    )[0]


def make_sample(config: ConfigDict, setup: Setup) -> distributed.Sampler:
    """Answers to the problems of a step, each problem once in an epoch."""
    stream = data.Stream(setup.train, config.prompts, seed=config.seed)

    def sample(newest: Newest, seed: int, number: int) -> Rollout:
        problems, _ = data.next_batch(stream, data.state_at(stream, number))
        key = jax.random.fold_in(jax.random.key(seed), number)
        return play(config, setup, newest, problems, key, config.group_size)

    return sample


def make_update(config: ConfigDict, model: models.Model) -> Any:
    """One turn of the algorithm, from what was sampled to the next state."""
    train_step = make_clip_step(config, model, make_optimizer(config))

    def update(state: TrainState, sampled: Rollout) -> tuple[TrainState, Metrics]:
        mask = sampled.mask & sampled.scorable[:, None]
        advantages = ops.grpo_advantages(sampled.rewards, sampled.group_ids, mask, valid=sampled.scorable)
        ref_logprobs = score(model, state.ref_params, sampled)[0] if config.kl_coefficient else None
        state, metrics = train_step(state, Batch(sampled, mask, sampled.logprobs, advantages, ref_logprobs))
        return state, {**metrics, **describe_rollout(sampled), "tokens": jnp.sum(sampled.lengths)}

    return update


def programs(config: ConfigDict) -> dict[str, train.Program]:
    """What `experiments.plan` compiles, for a model of the config's sizes: nothing is fetched."""
    model = models.make_decoder(models.DecoderConfig(config.vocab_size, **config.model))
    step, init = make_clip_step(config, model, make_optimizer(config)), init_policy(config, make_optimizer(config))
    reference = bool(config.kl_coefficient)
    return step_programs(config, model, step, init, reference=reference, dtype=jnp.dtype(config.dtype))


def run(config: ConfigDict, log: train.RunLog) -> None:
    """Warm start, then answers, rewards and updates until the steps are done, then the policy and the report."""
    if not isinstance(config.seed, int):
        raise ValueError(f"config.seed={config.seed}: rollouts on the host are of one seed; give each a run of its own")
    setup = make_setup(config)
    reference = warm_start(config, setup, log)
    state = distributed.loop(
        jax.tree_util.Partial(init_policy(config, make_optimizer(config)), reference),
        make_update(config, setup.model),
        partial(make_sample, setup=setup),
        policy=lambda params: params["policy"],
        steps=config.steps,
        log=log,
    )
    summary: dict[str, Any] = {}
    for name, params in {"warm_start": reference, "trained": state.params["policy"]}.items():
        for split, problems in {"train_success": setup.train, "success": setup.test}.items():
            sampled = play(config, setup, params, list(problems)[: config.eval_problems], jax.random.key(1), 1)
            summary.setdefault(name, {})[split] = jax.device_get(describe_rollout(sampled)["success"])
            log.outcomes(f"{name}.{split}", sampled.rewards)
    sampling.write_transcripts(log.workdir / "rollouts.jsonl", sampled, setup.model.tokenizer)
    models.save(setup.model, state.params["policy"], log.workdir / "policy")
    log.summary(summary)


TABLES = {
    "main": train.Table(
        arms={"grpo": {}, "warm_start": {"steps": 0}},
        metrics=["trained.train_success", "trained.success"],
        claims=[train.better("grpo", "warm_start")],
        title="Answers to 64 problems of GSM8K that are trained on, and to 20 that are not",
    ),
}
