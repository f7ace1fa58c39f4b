"""Checkpoints that are whole or not there: written by orbax in the background, checked against a digest when read.

One folder a step, `<folder>/<step>`. It is written under a temporary name and renamed once its success marker is
inside, so a process killed at any moment leaves no half checkpoint under a final name. Every array has a CRC-32 in the
checkpoint's digest; what a disk or a copy spoilt afterwards is found at restore, and the checkpoint before is used.

Measured on two CPU cores with a 1M-parameter AdamW state (12 MB): the training thread pays 5 ms for a copy, the write
takes 60 to 90 ms in the background, a restore 25 ms, importing orbax 0.3 s, paid at the first save or restore. A save
every step therefore costs a short step as much as itself; every 10 to 50 steps it is lost in the noise.
"""

from __future__ import annotations

import shutil
import threading
import warnings
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

_SAVING = threading.Lock()  # orbax mixes up two saves of one process; trainers in threads have one each
MARKER = "commit_success.txt"  # orbax writes it before it renames the temporary folder


class CheckpointError(RuntimeError):
    """A checkpoint cannot be used: damaged, or of another structure than the state it should fill."""


class Checkpoints:
    """The newest `keep` checkpoints of one stage in `folder`. One process at a time, which must see all of every array.

    Raises:
      ValueError: `keep` below 1.
    """

    def __init__(self, folder: str | Path, keep: int = 2) -> None:
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        self.folder = Path(folder).absolute()
        self.keep = keep
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._in_flight: Future[None] | None = None

    def save(self, step: int, state: PyTree) -> None:
        """Starts writing `state`; returns once a copy of it is taken, so that its buffers may be donated.

        At most one write is under way: a second save waits for the first.

        Raises:
          whatever made the write before this one fail.
        """
        self.wait()
        arrays = _to_host(state)
        self._in_flight = self._writer.submit(self._write, step, arrays)

    def wait(self) -> None:
        """Returns when no write is under way, and raises what the last one raised."""
        future, self._in_flight = self._in_flight, None
        if future is not None:
            future.result()

    def close(self) -> None:
        """Waits for the write under way and ends the background thread."""
        try:
            self.wait()
        finally:
            self._writer.shutdown()

    def restore(self, template: PyTree) -> tuple[int, PyTree] | None:
        """The newest good checkpoint as `(step, state)`, or None where none was ever finished.

        A damaged one is named in a warning, renamed to `<step>.bad` and passed over.

        Args:
          template: a state of the wanted structure, shapes and types; the arrays go to the devices where its own lie.

        Raises:
          CheckpointError: checkpoints are there, but each is damaged; or a good one has another structure, shape or
            type.
        """
        for leftover in self.folder.glob("*orbax-checkpoint-tmp*"):
            shutil.rmtree(leftover, ignore_errors=True)
        steps = finished_steps(self.folder)
        reasons = []
        for step in reversed(steps):
            try:
                arrays = read_arrays(self.folder / str(step))
            except CheckpointError as error:
                reasons.append(str(error))
                warnings.warn(f"{error}; trying the one before", RuntimeWarning, stacklevel=2)
                continue
            for bad in steps[steps.index(step) + 1 :]:
                _set_aside(self.folder / str(bad))
            return step, _fill(template, arrays, self.folder / str(step))
        if steps:
            raise CheckpointError(
                f"no checkpoint in {self.folder} can be read: {'; '.join(reasons)}. "
                "Delete the folder to start this stage again."
            )
        return None

    def _write(self, step: int, arrays: dict[str, np.ndarray]) -> None:
        import orbax.checkpoint as ocp

        path = self.folder / str(step)
        # Orbax refuses arrays without elements; their shape in the digest is all there is to know.
        filled = {name: array for name, array in arrays.items() if array.size}
        with _SAVING, ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            checkpointer.save(
                path,
                ocp.args.Composite(state=ocp.args.PyTreeSave(filled), digest=ocp.args.JsonSave(_digest(arrays))),
                force=True,
            )
        for old in finished_steps(self.folder)[: -self.keep]:
            # Renamed first, so that a kill while deleting leaves no half checkpoint either.
            doomed = (self.folder / str(old)).rename(self.folder / f"{old}.orbax-checkpoint-tmp-deleting")
            shutil.rmtree(doomed, ignore_errors=True)


def finished_steps(folder: str | Path) -> list[int]:
    """Steps of the finished checkpoints in a stage's folder, ascending, damaged ones included."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit() and (path / MARKER).exists())


def read_arrays(path: str | Path) -> dict[str, np.ndarray]:
    """All arrays of one checkpoint by the path of their leaf, verified against the digest.

    Raises:
      CheckpointError: something is missing, torn or different from what was written; the message names the folder.
    """
    import orbax.checkpoint as ocp

    path = Path(path).absolute()
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            restored = checkpointer.restore(
                path, ocp.args.Composite(state=ocp.args.PyTreeRestore(), digest=ocp.args.JsonRestore())
            )
        digest, arrays = restored.digest, {name: np.asarray(array) for name, array in restored.state.items()}
        for name, entry in digest.items():
            if 0 in entry["shape"]:
                arrays[name] = np.zeros(entry["shape"], np.dtype(entry["dtype"]))
        found = _digest(arrays)
    except Exception as error:  # Damage shows as any error, from JSON's to tensorstore's.
        reason = str(error).strip().split("\n")[0][:200]
        raise CheckpointError(f"checkpoint {path} is damaged ({type(error).__name__}: {reason})") from error
    wrong = sorted(name for name in digest.keys() | found.keys() if digest.get(name) != found.get(name))
    if wrong:
        raise CheckpointError(f"checkpoint {path} is damaged (digest differs for {', '.join(wrong[:3])})")
    return arrays


def _to_host(state: PyTree) -> dict[str, np.ndarray]:
    """Copies of all leaves by path. A view would not do: on a CPU it shares memory that the next step is given."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    for path, leaf in leaves:
        if isinstance(leaf, jax.Array):
            if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                raise ValueError(
                    f"state{jax.tree_util.keystr(path)} is a typed random key; keep a seed and fold keys from it"
                )
            if not leaf.is_fully_addressable:
                raise ValueError(
                    f"state{jax.tree_util.keystr(path)} is spread over several processes; these checkpoints are "
                    "written by one process that sees every array"
                )
    host = jax.device_get([leaf for _, leaf in leaves])
    return {jax.tree_util.keystr(path): np.array(leaf) for (path, _), leaf in zip(leaves, host, strict=True)}


def _digest(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    return {
        name: {
            "crc32": zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data) if array.size else 0,
            "dtype": str(array.dtype),
            "shape": list(array.shape),
        }
        for name, array in arrays.items()
    }


def _fill(template: PyTree, arrays: dict[str, np.ndarray], path: Path) -> PyTree:
    leaves = jax.tree_util.tree_leaves_with_path(template)
    wanted = {jax.tree_util.keystr(key): leaf for key, leaf in leaves}
    problems = [f"state{name} is missing" for name in wanted if name not in arrays]
    problems += [f"state{name} is not wanted" for name in arrays if name not in wanted]
    for name in wanted.keys() & arrays.keys():
        want, got = wanted[name], arrays[name]
        if (want.shape, np.dtype(want.dtype)) != (got.shape, got.dtype):
            problems.append(f"state{name} is {got.dtype}{list(got.shape)}, wanted {want.dtype}{list(want.shape)}")
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(
            f"checkpoint {path} does not fit the state: {'; '.join(sorted(problems)[:5])}{more}. "
            "It was made by other code or settings: use another workdir."
        )

    def put(name: str, leaf: Any) -> Any:
        # An array that was bound to no device must not be bound now: the step would be compiled a second time.
        if isinstance(leaf, jax.Array) and leaf.committed:
            return jax.device_put(arrays[name], leaf.sharding)
        return jax.device_put(arrays[name])

    filled = [put(name, leaf) for name, leaf in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(template), filled)


def _set_aside(path: Path) -> None:
    target = path.with_name(f"{path.name}.bad")
    shutil.rmtree(target, ignore_errors=True)
    path.rename(target)
