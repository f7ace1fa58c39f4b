"""Settings that must hold before jax is imported, how hypothesis runs, and where coverage is measured."""

import importlib.metadata
import os
from pathlib import Path

import hypothesis
import pytest

ROOT = Path(__file__).resolve().parents[1]

# Set in the environment, so that tests which start a process of their own pass them on. A caller's setting wins:
# JAX_PLATFORMS=cuda pytest runs the tests on a GPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
# Functions that run once, on a few numbers: to optimize their machine code takes longer than it saves, and to write
# that of fused loops by way of MLIR longer still. What XLA does to a program before that stays as it is. With
# JAX_DISABLE_MOST_OPTIMIZATIONS=0 and XLA_FLAGS=--xla_cpu_use_fusion_emitters=true all is compiled as users do.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if importlib.metadata.version("jax").startswith("0.10."):  # a flag that an XLA does not know ends the process
    os.environ["XLA_FLAGS"] = f"--xla_cpu_use_fusion_emitters=false {os.environ.get('XLA_FLAGS', '')}"
# Threads of XLA: those of an interpreted GPU kernel wait for each other, and with one for each of two cores forever.
os.environ.setdefault("NPROC", str(max(8, os.cpu_count() or 1)))

# No deadline, as the first example compiles; the same examples on every run, so that a failure can be looked at again.
hypothesis.settings.register_profile(
    "house",
    deadline=None,
    max_examples=25,
    derandomize=True,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("house")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What the Makefile measures the coverage of has tests of its own, and only they count: to follow every line costs
    a test up to a third more time."""
    for item in items:
        if item.path.parent.name not in ("ops", "sampling", "train"):
            item.add_marker("no_cover")
