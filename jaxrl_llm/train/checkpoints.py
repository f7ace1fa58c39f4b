"""Checkpoints that are whole or not there: written by orbax in the background, checked against a digest when read.

One folder a step, `<folder>/<step>`. It is written under a temporary name and renamed once its success marker is
inside, so a process killed at any moment leaves no half checkpoint under a final name. With several processes each
writes the parts of arrays that lie on its own devices, into one folder that all of them see; nothing is gathered. A
checkpoint may be restored onto another mesh and by another number of processes or devices.

Every array has a digest, a sum over its elements of a hash of place and bits, which does not depend on how the array is
divided. It is computed where the array lies, before it is written and again once it is back: what a disk or a copy
spoilt in between is found, and the checkpoint before is used.

A disk that is full ends the run: what is half written is removed, the checkpoints before stay, and `DiskFullError`
names the folder and the bytes. The same command goes on from the newest of them once there is room.

The training thread waits for one copy of its arrays; the rest happens behind it. Saves in every step of a short step
would dominate it; every 10 to 50 steps they are lost in the noise.
"""

from __future__ import annotations

import errno
import json
import shutil
import threading
import warnings
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree, Shaped, UInt32

from jaxrl_llm.files import raise_if_full
from jaxrl_llm.train.processes import all_agree, is_writer, largest

_SAVING = threading.Lock()  # orbax mixes up two saves of one process; trainers in threads have one each
MARKER = "commit_success.txt"  # orbax writes it before it renames the temporary folder
PARTIAL = "*orbax-checkpoint-tmp*"
NO_STEP = -1


class CheckpointError(RuntimeError):
    """A checkpoint cannot be used (damaged, or of another structure than the state it should fill), or not written."""


class Checkpoints:
    """The newest `keep` checkpoints of one stage in `folder`. All processes of a run make one and call it alike.

    Raises:
      ValueError: `keep` below 1.
    """

    def __init__(self, folder: str | Path, keep: int = 2) -> None:
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        self.folder = Path(folder).absolute()
        self.keep = keep
        self._writer: Any = None
        self._background = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._in_flight: tuple[Path, int] | None = None  # and its bytes
        self._committed: Future[None] | None = None

    def save(self, step: int, state: PyTree) -> None:
        """Starts writing `state`; returns once a copy of it is taken, so that its buffers may be donated.

        At most one write is under way: a second save waits for the first.

        Raises:
          DiskFullError: there is no room for this one, or was none for the one before it.
          CheckpointError: one of them could not be written for another reason.
        """
        import orbax.checkpoint as ocp

        self.wait()
        arrays = _by_path(state)
        if self._writer is None:
            self._writer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        self._in_flight = self.folder / str(step), sum(array.nbytes for array in arrays.values())
        try:
            self._check_space()
            digest = _sealed(_digest(arrays))
            if jax.default_backend() == "cpu":  # where what orbax takes for a copy shares memory with the array
                arrays = jax.tree.map(jnp.copy, arrays)
            # Orbax refuses arrays without elements; their shape in the digest is all there is to know.
            filled = {name: array for name, array in arrays.items() if array.size}
            args = ocp.args.Composite(state=ocp.args.PyTreeSave(filled), digest=ocp.args.JsonSave(digest))
            _SAVING.acquire()
            try:
                self._writer.save(self._in_flight[0], args, force=True)
            except BaseException:
                _SAVING.release()
                raise
            self._committed = self._background.submit(self._commit)
        except Exception as error:
            self._fail(error)

    def _commit(self) -> None:
        try:
            self._writer.wait_until_finished()
        finally:
            _SAVING.release()

    def wait(self) -> None:
        """Returns when no write is under way, and the checkpoints beyond `keep` are deleted.

        Raises:
          DiskFullError, CheckpointError: the last write failed. What it left is removed.
        """
        if self._in_flight is None:
            return
        assert self._committed is not None
        try:
            self._committed.result()
        except Exception as error:  # from OSError to what tensorstore makes of one
            self._fail(error)
        self._in_flight = None
        if is_writer():
            for old in finished_steps(self.folder)[: -self.keep]:
                # Renamed first, so that a kill while deleting leaves no half checkpoint either.
                doomed = (self.folder / str(old)).rename(self.folder / f"{old}.orbax-checkpoint-tmp-deleting")
                shutil.rmtree(doomed, ignore_errors=True)

    def close(self) -> None:
        """Waits for the write under way and ends the background thread."""
        try:
            self.wait()
        finally:
            self._background.shutdown()
            writer, self._writer = self._writer, None
            if writer is not None:
                writer.close()

    def restore(self, template: PyTree) -> tuple[int, PyTree] | None:
        """The newest good checkpoint as `(step, state)`, or None where none was ever finished.

        A damaged one is named in a warning, renamed to `<step>.bad` and passed over.

        Args:
          template: a state of the wanted structure, shapes and types; the arrays go to the devices where its own lie.

        Raises:
          CheckpointError: checkpoints are there, but each is damaged; or a good one has another structure, shape or
            type.
        """
        if is_writer():
            self._remove_partial()
        wanted = _by_path(template)
        reasons: list[str] = []
        damaged: list[Path] = []
        while (step := self._newest_before(int(damaged[-1].name) if damaged else None)) != NO_STEP:
            path = self.folder / str(step)
            try:
                arrays = _restore(path, wanted)
            except _Damaged as error:
                damaged.append(path)
                reasons.append(str(error))
                warnings.warn(f"{error}; trying the one before", RuntimeWarning, stacklevel=2)
                continue
            if is_writer():
                for bad in damaged:
                    shutil.rmtree(bad.with_name(f"{bad.name}.bad"), ignore_errors=True)
                    bad.rename(bad.with_name(f"{bad.name}.bad"))
            return step, jax.tree.unflatten(jax.tree.structure(template), [arrays[name] for name in wanted])
        if damaged:
            raise CheckpointError(
                f"no checkpoint in {self.folder} can be read: {'; '.join(reasons)}. "
                "Delete the folder to start this stage again."
            )
        return None

    def _newest_before(self, bound: int | None) -> int:
        """The newest finished step below `bound`, as process 0 sees it, or NO_STEP."""
        steps = [step for step in finished_steps(self.folder) if bound is None or step < bound] if is_writer() else []
        return int(largest(max(steps, default=NO_STEP)))

    def _check_space(self) -> None:
        assert self._in_flight is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(self.folder).free < self._in_flight[1]:
            raise OSError(errno.ENOSPC, "No space left on device")

    def _fail(self, error: Exception) -> None:
        assert self._in_flight is not None
        (path, needed), self._in_flight = self._in_flight, None
        self._remove_partial()
        raise_if_full(error, path, needed)
        raise CheckpointError(
            f"checkpoint {path} could not be written ({_describe(error)}). Those before it are as they were, and the "
            "same command goes on from the newest"
        ) from error

    def _remove_partial(self) -> None:
        for leftover in self.folder.glob(PARTIAL):
            shutil.rmtree(leftover, ignore_errors=True)


class _Damaged(CheckpointError):
    pass


def finished_steps(folder: str | Path) -> list[int]:
    """Steps of the finished checkpoints in a stage's folder, ascending, damaged ones included."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit() and (path / MARKER).exists())


def read_arrays(path: str | Path) -> dict[str, np.ndarray]:
    """All arrays of one checkpoint by the path of their leaf, whole, verified against the digest. For one process.

    Raises:
      CheckpointError: something is missing, torn or different from what was written; the message names the folder.
    """
    return {name: np.asarray(array) for name, array in _restore(Path(path).absolute(), None).items()}


def _restore(path: Path, wanted: dict[str, Any] | None) -> dict[str, Any]:
    """The verified arrays of a checkpoint: where those of `wanted` lie, or NumPy arrays."""
    digest, arrays, problem = {}, {}, ""
    try:
        digest = _read_digest(path)
    except Exception as error:
        problem = _describe(error)
    _agree(path, problem)
    if wanted is not None:
        _check_structure(path, digest, wanted)
    try:
        arrays = _read(path, digest, wanted)
    except Exception as error:  # Damage shows as any error, from JSON's to tensorstore's.
        problem = _describe(error)
    _agree(path, problem)  # before the digests, which take all processes
    found = _digest(arrays)
    wrong = sorted(name for name in digest if digest[name] != found[name])
    _agree(path, f"digest differs for {', '.join(wrong[:3])}" if wrong else "")
    return arrays


def _agree(path: Path, problem: str) -> None:
    if not all_agree(not problem):
        raise _Damaged(f"checkpoint {path} is damaged ({problem or 'as another process says'})")


def _describe(error: Exception) -> str:
    reason = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {reason if len(reason) < 300 else f'{reason[:100]} ... {reason[-200:]}'}"


def _read_digest(path: Path) -> dict[str, Any]:
    sealed = json.loads((path / "digest" / "metadata").read_text())
    if sealed != _sealed(sealed["arrays"]):
        raise ValueError("the digest differs from its own checksum")
    return sealed["arrays"]


def _read(path: Path, digest: dict[str, Any], wanted: dict[str, Any] | None) -> dict[str, Any]:
    import orbax.checkpoint as ocp

    # An array that was bound to no device must not be bound now: the step would be compiled a second time.
    bound = {
        name: leaf.sharding for name, leaf in (wanted or {}).items() if isinstance(leaf, jax.Array) and leaf.committed
    }
    filled = [name for name, entry in digest.items() if 0 not in entry["shape"]]
    how = {
        name: ocp.ArrayRestoreArgs(sharding=bound[name]) if name in bound else ocp.RestoreArgs(restore_type=np.ndarray)
        for name in filled
    }
    # The handler, not a Checkpointer: that waits for all processes, and one that cannot read would never come.
    args = ocp.args.PyTreeRestore(item=dict.fromkeys(filled, 0), restore_args=how)
    restored = ocp.PyTreeCheckpointHandler().restore(path / "state", args=args)
    arrays = {}
    for name, entry in digest.items():
        array = restored[name] if name in restored else np.zeros(entry["shape"], jnp.dtype(entry["dtype"]))
        unplaced = wanted is not None and not isinstance(array, jax.Array)
        arrays[name] = jax.device_put(array, bound.get(name)) if unplaced else array
    return arrays


def _by_path(state: PyTree) -> dict[str, Any]:
    arrays = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = jax.tree_util.keystr(path)
        if jax.dtypes.issubdtype(getattr(leaf, "dtype", None), jax.dtypes.prng_key):
            raise ValueError(f"state{name} is a typed random key; keep a seed and fold keys from it")
        arrays[name] = leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf)
    return arrays


def _digest(arrays: dict[str, Any]) -> dict[str, Any]:
    # One after another: many programs with sums over simulated devices under way can wait for each other for ever.
    return {
        name: {"digest": int(_sum_of_hashes(array)), "dtype": str(array.dtype), "shape": list(array.shape)}
        for name, array in arrays.items()
    }


def _sealed(digest: dict[str, Any]) -> dict[str, Any]:
    return {"arrays": digest, "crc32": zlib.crc32(json.dumps(digest, sort_keys=True).encode())}


@jax.jit
def _sum_of_hashes(array: Shaped[Array, "..."]) -> UInt32[Array, ""]:
    """Over all elements, modulo 2^32. For each place the hash is one-to-one in the bits: no single change is missed.

    The whole array is never flattened, so that with a sharded one each device sums its own part.
    """
    if array.dtype.itemsize > 4:
        bits = jax.lax.bitcast_convert_type(array, jnp.uint32)  # two on a new last axis
    elif jnp.issubdtype(array.dtype, jnp.floating):
        bits = jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * array.dtype.itemsize}")).astype(jnp.uint32)
    else:
        bits = array.astype(jnp.uint32)
    place = jnp.zeros((), jnp.uint32)
    for axis in range(bits.ndim):
        place = _mix(place + jnp.uint32(0x9E3779B9)) ^ jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    return jnp.sum(_mix(bits ^ _mix(place)), dtype=jnp.uint32)


def _mix(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """The finalizer of MurmurHash3 (Appleby 2011), a one-to-one map."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _check_structure(path: Path, digest: dict[str, Any], wanted: dict[str, Any]) -> None:
    problems = [f"state{name} is missing" for name in wanted if name not in digest]
    problems += [f"state{name} is not wanted" for name in digest if name not in wanted]
    for name in wanted.keys() & digest.keys():
        want, got = wanted[name], digest[name]
        if (list(want.shape), str(want.dtype)) != (got["shape"], got["dtype"]):
            problems.append(f"state{name} is {got['dtype']}{got['shape']}, wanted {want.dtype}{list(want.shape)}")
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(
            f"checkpoint {path} does not fit the state: {'; '.join(sorted(problems)[:5])}{more}. "
            "It was made by other code or settings: use another workdir."
        )
