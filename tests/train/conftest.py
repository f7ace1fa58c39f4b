"""Shared by the tests of training: the bandit page, and configs of it."""

from pathlib import Path

import pytest

from jaxrl_llm.train.config import load_config, load_module

PAGE_FILE = Path(__file__).with_name("bandit_page.py")


@pytest.fixture(scope="session")
def page():
    return load_module(PAGE_FILE)


@pytest.fixture(scope="session")
def make_config():
    return lambda **overrides: load_config(f"{PAGE_FILE}:small", overrides)
