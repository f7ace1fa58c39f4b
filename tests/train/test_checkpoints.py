"""Checkpoints: exact, checked, the one before when the newest is damaged."""

import json
import resource
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxrl_llm.files import DiskFullError
from jaxrl_llm.train import Checkpoints, init_state, make_optimizer, optimizer_config
from jaxrl_llm.train.checkpoints import CheckpointError, finished_steps, read_arrays


def make_state(value=1.0, width=300):
    rng = np.random.default_rng(0)
    params = {
        "w": jnp.asarray(value * rng.normal(size=(width, 7)), jnp.float32),
        "half": jnp.asarray(rng.normal(size=5), jnp.bfloat16),
        "flags": jnp.array([True, False]),
        "empty": jnp.zeros((0, 3)),
        "scalar": jnp.float32(np.nan),
    }
    floats = {name: leaf for name, leaf in params.items() if jnp.issubdtype(leaf.dtype, jnp.floating)}
    return init_state(params, make_optimizer(optimizer_config(0.1)), seed=3, ref_params=floats)


def save_all(folder, steps, keep=2):
    checkpoints = Checkpoints(folder, keep)
    for step in steps:
        checkpoints.save(step, make_state(step))
    checkpoints.close()


def assert_same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert left.dtype == right.dtype and np.asarray(left).tobytes() == np.asarray(right).tobytes()


def test_everything_comes_back_bit_for_bit(tmp_path):
    assert Checkpoints(tmp_path / "none").restore(make_state()) is None
    save_all(tmp_path, [2, 4, 6])
    assert finished_steps(tmp_path) == [4, 6]
    step, state = Checkpoints(tmp_path).restore(make_state())
    assert step == 6
    assert_same(state, make_state(6))
    assert not state.params["w"].committed  # bound to no device: the next step is not compiled anew
    assert read_arrays(tmp_path / "4")[".params['half']"].dtype == ml_dtypes.bfloat16


def test_a_saved_state_may_be_donated_at_once(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    step = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + jnp.ones((), leaf.dtype), state), donate_argnums=0)
    state = {"w": jnp.zeros(500_000)}
    for number in range(4):
        if number == 2:
            checkpoints.save(2, state)
        state = step(state)
    jax.block_until_ready(state)
    checkpoints.close()
    np.testing.assert_array_equal(read_arrays(tmp_path / "2")["['w']"], np.full(500_000, 2.0))


def largest_file(path):
    return max((file for file in path.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)


def truncate(path):
    file = largest_file(path)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip_a_bit(path):
    file = largest_file(path)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def delete_the_digest(path):
    shutil.rmtree(path / "digest")


def change_the_digest(path):
    file = path / "digest" / "metadata"
    digest = json.loads(file.read_text())
    digest["arrays"][".params['w']"]["digest"] ^= 1
    file.write_text(json.dumps(digest))


def delete_the_arrays(path):
    largest_file(path).unlink()


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, delete_the_digest, change_the_digest, delete_the_arrays])
def test_a_damaged_newest_is_named_and_passed_over(tmp_path, damage):
    save_all(tmp_path, [4, 6])
    damage(tmp_path / "6")
    checkpoints = Checkpoints(tmp_path)
    with pytest.warns(RuntimeWarning, match=f"checkpoint {tmp_path}/6 is damaged .*; trying the one before"):
        step, state = checkpoints.restore(make_state())
    assert step == 4
    assert_same(state, make_state(4))
    assert (tmp_path / "6.bad").exists() and finished_steps(tmp_path) == [4]
    checkpoints.save(6, make_state(6))
    checkpoints.close()
    assert Checkpoints(tmp_path).restore(make_state())[0] == 6
    for path in ("4", "6"):
        damage(tmp_path / path)
    with pytest.warns(RuntimeWarning), pytest.raises(CheckpointError, match="no checkpoint in .* can be read"):
        Checkpoints(tmp_path).restore(make_state())


def test_a_half_written_one_does_not_count(tmp_path):
    save_all(tmp_path, [4, 6])
    (tmp_path / "6").rename(tmp_path / "6.orbax-checkpoint-tmp")
    shutil.copytree(tmp_path / "4", tmp_path / "8")
    (tmp_path / "8" / "commit_success.txt").unlink()
    assert Checkpoints(tmp_path).restore(make_state())[0] == 4
    assert not (tmp_path / "6.orbax-checkpoint-tmp").exists()
    save_all(tmp_path, [8])
    assert finished_steps(tmp_path) == [4, 8]


def test_another_structure_is_an_error_that_names_leaves(tmp_path):
    save_all(tmp_path, [1])
    with pytest.raises(CheckpointError, match=r"state.params\['w'\] is float32\[300, 7\], wanted float32\[200, 7\]"):
        Checkpoints(tmp_path).restore(make_state(width=200))
    with pytest.raises(CheckpointError, match="is not wanted"):
        Checkpoints(tmp_path).restore({"other": jnp.zeros(1)})
    with pytest.raises(ValueError, match="typed random key"):
        Checkpoints(tmp_path).save(2, {"key": jax.random.key(0)})
    with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
        Checkpoints(tmp_path, keep=0)


def test_a_failed_write_is_raised_at_the_next_call(tmp_path):
    (tmp_path / "file").write_text("")
    checkpoints = Checkpoints(tmp_path / "file")
    with pytest.raises(CheckpointError, match=f"checkpoint {tmp_path}/file/1 could not be written"):
        checkpoints.save(1, {"w": jnp.zeros(2)})
        checkpoints.close()


@pytest.mark.parametrize("found", ["before", "behind"])
def test_a_full_disk_is_named_and_leaves_what_was_saved(tmp_path, monkeypatch, found):
    """There is too little room to begin with, or it turns out so in the background."""
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(2, make_state())
    checkpoints.wait()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with monkeypatch.context() as patch:
        if found == "before":
            patch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1234))
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        try:
            with pytest.raises(DiskFullError, match=r"4 could not be written .* takes [\d,]+ bytes.*are free"):
                checkpoints.save(4, make_state())
                checkpoints.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["2"]
    checkpoints.save(6, make_state(6))
    checkpoints.close()
    assert finished_steps(tmp_path) == [6]
    assert_same(Checkpoints(tmp_path).restore(make_state())[1], make_state(6))
