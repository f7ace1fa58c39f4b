"""Kernels for Hopper GPUs under JAX's interpreter."""

import threading

import jax
import pytest
from jax._src.pallas.mosaic.interpret import thread_map


@pytest.fixture(autouse=True, scope="session")
def compile_each_interpreted_kernel_once():
    """The interpreter compiles a kernel again for each warpgroup of each block of its grid: ten times the time."""
    compiled, lock = {}, threading.Lock()

    def run(jaxpr, consts, *args):
        with lock:
            if id(jaxpr) not in compiled:
                function = jax.jit(lambda consts, *args: jax.core.eval_jaxpr(jaxpr, consts, *args))
                # with the jaxpr beside it, so that no later one gets its id
                compiled[id(jaxpr)] = jaxpr, function.lower(consts, *args).compile()
        compiled[id(jaxpr)][1](consts, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(thread_map, "_run_jaxpr", run)
        yield


@pytest.fixture(autouse=True)
def compile_interpreters_quickly(request):
    """Kernels under an interpreter are compiled without XLA's optimizations: the kernel is tested, not the code that
    stands in for a GPU or a TPU. What runs on a CPU in earnest is compiled as ever."""
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    quick = str(parameters.get("implementation")).startswith("interpret")
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", quick)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(autouse=True)
def without_flags_of_cpus(request):
    """For TPUs: libtpu ends a process whose XLA_FLAGS it does not know, and tests/conftest.py sets such ones."""
    with pytest.MonkeyPatch.context() as patch:
        if request.node.get_closest_marker("slow"):
            patch.delenv("XLA_FLAGS", raising=False)
        yield
