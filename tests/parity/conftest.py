"""Fixtures of the comparisons with PyTorch."""

import os

import numpy as np
import pytest


@pytest.fixture
def seed(request):
    """A fresh seed for every test, printed if it fails. PARITY_SEED=... repeats one."""
    drawn = int(os.environ.get("PARITY_SEED") or np.random.default_rng().integers(2**31))
    print(f"PARITY_SEED={drawn} repeats {request.node.name}")
    return drawn
