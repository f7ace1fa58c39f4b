"""cache_write: every version against a loop in NumPy, tokens that are dropped included, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies

from jaxrl_kernels.cache_write import cache_write

# slots of 3 tokens: in one tile, over a border of tiles, in another order, none at all, some of them
PLACES = np.array([[4, 5, 6], [126, 127, 128], [200, 17, 199], [-1, -1, 256], [-1, 40, -1]])
PAGES = np.array([[2, 2, 2], [0, 0, 0], [3, 3, 1], [5, 1, 1], [9, 4, 4]])


def make(width=32, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shapes = (6, 2, width, 256), (6, 2, 256, width), (5, 3, 2, width), (5, 3, 2, width)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


@pytest.mark.parametrize("implementation", [None, "interpret_tpu"])
@pytest.mark.parametrize(("width", "dtype"), [(32, jnp.float32), (128, jnp.bfloat16)])
@pytest.mark.parametrize("nothing", [False, True])
def test_writes_what_a_loop_writes(implementation, width, dtype, nothing):
    arrays = make(width, dtype)
    pages = np.full_like(PAGES, 6) if nothing else PAGES
    k_pages, v_pages, keys, values = (np.array(x) for x in arrays)
    for s, t in np.ndindex(PLACES.shape):
        page, place = pages[s, t], PLACES[s, t]
        if 0 <= page < 6 and 0 <= place < 256:
            k_pages[page, :, :, place], v_pages[page, :, place] = keys[s, t], values[s, t]
    got = jax.jit(cache_write, static_argnames="implementation")(*arrays, pages, PLACES, implementation=implementation)
    np.testing.assert_array_equal(got[0], k_pages)
    np.testing.assert_array_equal(got[1], v_pages)


def test_gradients():
    """Of what is overwritten none, of a token that of its place."""
    k_pages, v_pages, keys, values = make()
    weights = make()[:2]

    def total(implementation, *arrays):
        written = cache_write(*arrays, PAGES, PLACES, implementation=implementation)
        return sum(jnp.vdot(weight, x) for weight, x in zip(weights, written, strict=True))

    plain, kernel = (
        jax.jit(jax.grad(total, argnums=(1, 2, 3, 4)), static_argnums=0)(name, k_pages, v_pages, keys, values)
        for name in (None, "interpret_tpu")
    )
    jax.tree.map(np.testing.assert_array_equal, plain, kernel)
    np.testing.assert_array_equal(plain[2][0, 1], weights[0][2, :, :, 5])
    assert not plain[0][2, :, :, 5].any() and not plain[3][3].any()


def test_what_the_kernel_refuses():
    arrays = make()
    with pytest.raises(ValueError, match="pages of a multiple of 128 places, got 100"):
        cache_write(
            arrays[0][..., :100], arrays[1][:, :, :100], *arrays[2:], PAGES, PLACES, implementation="pallas_tpu"
        )


@pytest.mark.slow
@pytest.mark.parametrize("width", [64, 128])
def test_changes_pages_in_place_on_a_tpu(width):
    """64 slots of 512 MiB in all: nothing of that size beside them."""
    pytest.importorskip("libtpu")
    device = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]
    sharding = jax.sharding.SingleDeviceSharding(device)
    shapes = [(1024, 4, width, 512), (1024, 4, 512, width), (64, 2, 4, width), (64, 2, 4, width)]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding) for shape in shapes]
    arrays += [jax.ShapeDtypeStruct((64, 2), jnp.int32, sharding=sharding)] * 2
    compiled = jax.jit(cache_write, donate_argnums=(0, 1)).lower(*arrays).compile()
    assert "tpu_custom_call" in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes < 2**20
