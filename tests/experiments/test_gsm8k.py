"""GSM8K from a checkpoint's folder and the user's files: data, chat template, sampler, maths verifier, checkpoint."""

import asyncio
import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from configs.policy_optimization.gsm8k import get_config
from experiments.policy_optimization import gsm8k
from jaxrl_llm import models, rewards, train
from jaxrl_llm.train.config import override

TOKENIZER = models.load_tokenizer(Path(__file__).parents[1] / "models" / "golden" / "tokenizers" / "chatml")


def config_of(**overrides):
    config = get_config("tiny")
    for key, value in overrides.items():
        override(config, key.replace("__", "."), value)
    return config


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder as the hub has them, with a tokenizer and a template of Qwen's kind."""
    sizes = get_config("tiny").model.to_dict() | {"attention_bias": True}
    model = models.make_decoder(models.DecoderConfig(TOKENIZER.vocab_size, **sizes))
    path = tmp_path_factory.mktemp("hub") / "tiny"
    models.save(dataclasses.replace(model, tokenizer=TOKENIZER), jax.jit(model.init)(jax.random.key(0)), path)
    return str(path)


def test_from_files_and_a_checkpoint_to_a_checkpoint(checkpoint, tmp_path):
    lines = (gsm8k.SAMPLE / "test.jsonl").read_text().splitlines()
    for name, part in {"train": lines[:6], "test": lines[6:8]}.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(part))
    config = config_of(
        checkpoint=checkpoint,
        train_data=str(tmp_path / "train.jsonl"),
        test_data=str(tmp_path),  # a folder whose files are named by their split
        kl_coefficient=0.01,
    )
    summary = train.run_page(gsm8k, config, tmp_path / "run", quiet=True)
    assert all(0 <= summary[policy]["success"] <= 1 for policy in ("warm_start", "trained"))
    for metric in gsm8k.TABLES["main"].columns:
        train.find_metric(summary, metric)
    lines_of = {
        stage: [line for line in train.read_metrics(tmp_path / "run") if line["stage"] == stage]
        for stage in ("warm_start", "train")
    }
    assert lines_of["warm_start"][-1]["loss"] < lines_of["warm_start"][0]["loss"]
    for line in lines_of["train"]:
        # the host's sampler and the trainer are one model: what is left is the rounding of two orders of summation
        assert line["first_ratio_error"] < 1e-3 and line["skipped"] == 0
    policy = models.load(tmp_path / "run" / "policy")
    assert policy.family == "Qwen2ForCausalLM" and policy.tokenizer.chat_template == TOKENIZER.chat_template
    answers = [json.loads(line) for line in (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()]
    for line, answer in zip(map(json.loads, lines[6:8]), answers, strict=True):
        prompt, said = answer["spans"]
        assert line["question"] in prompt["text"] and prompt["text"].endswith("<|im_start|>assistant\n")
        gold = line["answer"].rpartition("####")[2].strip()
        assert answer["reward"] == rewards.math_equal(said["text"], [gold])


def test_worked_answers_are_right_and_others_wrong():
    """As the environment of a policy made here sees them; and what it imitates are those very tokens."""
    setup = gsm8k.make_setup(config_of())
    assert len(setup.train) == 64 and len(setup.test) == 20

    async def play(problem, answer):
        state, prompt = await setup.env.reset(problem)
        return prompt, *(await setup.env.step(state, answer + "<|im_end|>"))[1:]

    for problem in setup.train[:5]:
        assert "<<" not in problem["worked"] and gsm8k.INSTRUCTION in gsm8k.ask(problem)[0]["content"]
        prompt, observation, reward, done = asyncio.run(play(problem, problem["worked"]))
        assert (observation, reward, done) == ("", 1.0, True)
        assert asyncio.run(play(problem, "#### 123456"))[2] == 0
        tokenizer, chat = setup.model.tokenizer, gsm8k.ask(problem)
        ids, own = models.encode_chat(tokenizer, [*chat, {"role": "assistant", "content": problem["worked"]}])
        assert tokenizer.decode(np.array(ids)[~np.array(own)]) == prompt + "\n"
        assert tokenizer.decode(np.array(ids)[own]) == problem["worked"] + "<|im_end|>"


def test_several_seeds_are_refused():
    with pytest.raises(ValueError, match=r"config.seed=\(0, 1\): rollouts on the host are of one seed"):
        gsm8k.run(config_of(seed=(0, 1)), None)
