"""The pages of the family `policy_optimization`: each runs at tiny size, and traces with the settings of its paper."""

import importlib

import jax
import pytest

from configs.policy_optimization._base import MODELS, base_config
from experiments import all_pages, load_page
from experiments.plan import page_programs
from jaxrl_llm import train
from jaxrl_llm.models import DecoderConfig, make_decoder
from jaxrl_llm.train.config import override

PAGES = [files for files in all_pages() if files.family == "policy_optimization"]
POLICY_PAGES = [files for files in PAGES if hasattr(load_page(files), "build")]
RUN_HERE = [files for files in PAGES if files.slug != "gsm8k"]  # which its own test runs, from a checkpoint
PLANNED_PAGES = [files for files in PAGES if {"build", "programs"} & vars(load_page(files)).keys()]


def config_of(files, arm, overrides=()):
    config = importlib.import_module(".".join(files.config.with_suffix("").parts)).get_config(arm)
    for key, value in dict(overrides).items():
        override(config, key, value)
    return config


def shapes(page, config):
    """State and metrics of an iteration, traced and not run."""
    parts = page.build(config)

    def start_and_iterate(key):
        state = parts.init(parts.model.init(key), 0)
        return state, parts.iteration(state)

    return jax.eval_shape(start_and_iterate, jax.random.key(0))


def slugs(files):
    return [one.slug for one in files]


@pytest.mark.parametrize("files", RUN_HERE, ids=slugs(RUN_HERE))
def test_runs_at_tiny_size(files, tmp_path):
    page, config = load_page(files), config_of(files, "tiny")
    summary = train.run_page(page, config, tmp_path, quiet=True)
    for table in page.TABLES.values():
        for metric in table.columns:
            train.find_metric(summary, metric)


@pytest.mark.parametrize("files", PLANNED_PAGES, ids=slugs(PLANNED_PAGES))
def test_paper_settings_trace(files):
    """What `experiments.plan` compiles."""
    programs = page_programs(load_page(files), config_of(files, "paper"))
    traced = {name: jax.eval_shape(program.function, **program.arguments) for name, program in programs.items()}
    after, metrics = traced["train"]
    assert jax.tree.map(jax.numpy.shape, programs["train"].arguments["state"]) == jax.tree.map(jax.numpy.shape, after)
    assert metrics["loss"].shape == ()
    written, slots = traced["decode"]
    assert written.tokens.shape == programs["decode"].arguments["written"].tokens.shape


@pytest.mark.parametrize("files", POLICY_PAGES, ids=slugs(POLICY_PAGES))
def test_arms_of_the_tables_trace(files):
    page, seen = load_page(files), set()
    for table in page.TABLES.values():
        for arm in table.arms.values():
            if (key := repr(sorted(arm.items()))) not in seen:
                seen.add(key)
                shapes(page, config_of(files, "tiny", arm))


@pytest.mark.parametrize(
    ("name", "parameters"),  # as the checkpoints on the Hugging Face hub have them
    [
        ("llama3.1-8b", 8_030_261_248),
        ("qwen2.5-1.5b", 1_543_714_304),
        ("qwen2.5-3b", 3_085_938_688),
        ("qwen2.5-7b", 7_615_616_512),
        ("qwen2.5-14b", 14_770_033_664),
        ("qwen2.5-32b", 32_763_876_352),
    ],
)
def test_models_of_papers_have_their_published_size(name, parameters):
    config = train.choose_arm(base_config(), "paper", {"paper": MODELS[name]})
    shapes = jax.eval_shape(make_decoder(DecoderConfig(config.vocab_size, **config.model)).init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == parameters
