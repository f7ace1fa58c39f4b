"""Batches of an endless stream of records, with a position that is saved and restored exactly.

A position is one count, the records that all processes together have taken so far, written as
`{"epoch", "offset", "seed", "size"}`: int32 scalars, a pytree that goes into a checkpoint beside the parameters.
Everything else follows from it. An epoch's order is a function of seed and epoch alone, batches run on over the end of
an epoch, and each process takes its part of every batch of all. So nothing is left out or repeated in an epoch, a run
that was stopped at any record goes on with the very next one, and it may go on with another number of processes or
another batch size.

    state = stream_state(stream)
    while training:
        batch, following = next_batch(stream, state)   # pure: the same state, the same batch
        ...                                            # one or several updates on it
        state = following                              # only now: what is saved names what was trained on

A loop whose batch is a function of its step has no state to save: `next_batch(stream, state_at(stream, step))`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, Generic, TypeVar

import jax
import numpy as np
from jaxtyping import Int

T = TypeVar("T")
State = dict[str, np.int32]
LARGEST = 2**31 - 1  # what a checkpoint of int32 holds


@dataclasses.dataclass(frozen=True, eq=False)
class Stream(Generic[T]):
    """Where batches come from.

    Attributes:
      source: the records, or anything with a length and numbered items.
      batch_size: records in a batch of all processes together.
      seed: of the order, from 0 to 2^31 - 1.
      shuffle: a new order for each epoch; otherwise always that of `source`, e.g. a curriculum's.
      epochs: how often all records are gone through; None: without end. Records at the very end that fill no whole
        batch are left out.
      process_index, process_count: this process and their number; those of JAX if left out.

    Raises:
      ValueError: an empty source, or a number out of range; batch_size that is no multiple of process_count.
    """

    source: Sequence[T]
    batch_size: int
    seed: int = 0
    shuffle: bool = True
    epochs: int | None = None
    process_index: int = dataclasses.field(default_factory=jax.process_index)
    process_count: int = dataclasses.field(default_factory=jax.process_count)

    def __post_init__(self) -> None:
        if not 0 < len(self.source) <= LARGEST:
            raise ValueError(f"source has {len(self.source)} records; expected from 1 to {LARGEST}")
        if self.epochs is not None and self.epochs < 1:
            raise ValueError(f"epochs must be at least 1, or None for a stream without end, got {self.epochs}")
        _check_numbers(self.batch_size, self.seed, self.process_index, self.process_count)


def num_batches(stream: Stream[Any]) -> int:
    """How many batches a stream with `epochs` gives.

    Raises:
      ValueError: the stream is without end, or its records fill no batch.
    """
    if stream.epochs is None:
        raise ValueError("the stream is without end (epochs=None); give it epochs")
    number = stream.epochs * len(stream.source) // stream.batch_size
    if number == 0:
        raise ValueError(
            f"{stream.epochs} epochs of {len(stream.source)} records fill no batch of {stream.batch_size}; "
            "lower batch_size or raise epochs"
        )
    return number


def stream_state(stream: Stream[Any]) -> State:
    """The state at the beginning."""
    return state_at(stream, 0)


def state_at(stream: Stream[Any], step: int) -> State:
    """The state after `step` batches of the stream's present batch size."""
    epoch, offset = divmod(step * stream.batch_size, len(stream.source))
    return _state(epoch=epoch, offset=offset, seed=stream.seed, size=len(stream.source))


def next_batch(stream: Stream[T], state: Mapping[str, Any]) -> tuple[list[T], State]:
    """This process's records of the batch at `state`, and the state behind it. The parts of processes 0, 1, ... lie
    behind one another in the batch.

    Raises:
      ValueError: the state is of another seed or of a source of another size; or the stream's epochs are over, which
        a run that has nothing left to do must not take for success.
    """
    indices, following = next_indices(stream, state)
    return [stream.source[index] for index in indices.tolist()], following


def next_indices(stream: Stream[Any], state: Mapping[str, Any]) -> tuple[Int[np.ndarray, "B"], State]:
    """`next_batch` as indices into the source, for sources that are arrays."""
    size = len(stream.source)
    epoch, offset = _position(state, seed=stream.seed, size=size)
    position = epoch * size + offset
    if stream.epochs is not None and position + stream.batch_size > stream.epochs * size:
        raise ValueError(
            f"the stream is at its end: {position} records are taken, and of the {stream.epochs * size} of "
            f"epochs={stream.epochs} too few are left for a batch of {stream.batch_size}; raise epochs to go on"
        )
    own = _own_part(stream.batch_size, stream.process_index, stream.process_count)
    epochs, offsets = np.divmod(position + np.arange(own.start, own.stop, dtype=np.int64), size)
    indices = offsets
    if stream.shuffle:
        indices = np.concatenate(
            [permutation(size, stream.seed, int(e))[offsets[epochs == e]] for e in np.unique(epochs)]
        )
    epoch, offset = divmod(position + stream.batch_size, size)
    return indices, _state(epoch=epoch, offset=offset, seed=stream.seed, size=size)


@lru_cache(maxsize=2)
def permutation(size: int, *key: int) -> Int[np.ndarray, "N"]:
    """A permutation of `size` that is a function of `key` alone, of whole numbers from 0 on. Sorted from the bits of
    PCG64 and not by `Generator.permutation`, as NumPy promises to keep only the former from version to version."""
    order = np.argsort(np.random.PCG64(key).random_raw(size), kind="stable")
    order.flags.writeable = False  # the cache hands out this very array
    return order


def iterate_batches(
    open_records: Callable[[], Iterable[T]],
    state: Mapping[str, Any] | None = None,
    *,
    batch_size: int,
    seed: int = 0,
    window: int = 1,
    epochs: int | None = None,
    process_index: int | None = None,
    process_count: int | None = None,
) -> Iterator[tuple[list[T], State]]:
    """Batches of a source that can only be read from its beginning, each with the state behind it.

    Going on from a state reads and drops `offset` records first, and every process reads every record and keeps its
    own: reading must be cheap beside training, or the source be split into files that become a `Stream`.

    Args:
      open_records: begins an epoch, e.g. `lambda: iterate_records("big.jsonl", "prompt_only")`. It must give the same
        records every time.
      state: what came with the last batch that was trained on; None at the beginning.
      batch_size: records in a batch of all processes together.
      seed: of the order.
      window: records are shuffled among each `window` that follow one another; 1 keeps the source's order. A state is
        good for the window it was made with.
      epochs: how often all records are gone through; None: without end. Records at the very end that fill no whole
        batch are left out.
      process_index, process_count: this process and their number; those of JAX if left out.

    Raises:
      ValueError: a number out of range; the source is empty, or ends before the state's offset; the state is of
        another seed or window, or so near to the last epoch's end that there is not one batch to give.
    """
    index = jax.process_index() if process_index is None else process_index
    count = jax.process_count() if process_count is None else process_count
    _check_numbers(batch_size, seed, index, count)
    if window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    epoch, offset = (0, 0) if state is None else _position(state, seed=seed, window=window)
    records = _records_from(open_records, epoch, offset, seed, window, epochs)
    own = _own_part(batch_size, index, count)
    given = 0
    while len(batch := list(itertools.islice(records, batch_size))) == batch_size:
        epoch, offset, _ = batch[-1]
        given += 1
        yield [item for _, _, item in batch[own]], _state(epoch=epoch, offset=offset, seed=seed, window=window)
    if not given:
        raise ValueError(
            f"from epoch {epoch}, offset {offset}, to the end of epochs={epochs} there are {len(batch)} records, too "
            f"few for a batch of {batch_size}; raise epochs or lower batch_size"
        )


def _records_from(
    open_records: Callable[[], Iterable[T]], epoch: int, offset: int, seed: int, window: int, epochs: int | None
) -> Iterator[tuple[int, int, T]]:
    """Each record with epoch and offset behind it, from a position on."""
    while epochs is None or epoch < epochs:
        start = offset - offset % window
        records = iter(open_records())
        read = sum(1 for _ in itertools.islice(records, start))
        while block := list(itertools.islice(records, window)):
            if window > 1:
                block = [block[i] for i in permutation(len(block), seed, epoch, start // window).tolist()]
            for item in block[offset - start :]:
                offset += 1
                yield epoch, offset, item
            start += len(block)
            read += len(block)
        if read < offset or not read:
            raise ValueError(
                f"the source gave {read} records in epoch {epoch}, of which the state has taken {offset}; it must "
                "give the same records every time, and at least one"
            )
        epoch, offset = epoch + 1, 0


def _own_part(batch_size: int, process_index: int, process_count: int) -> slice:
    size = batch_size // process_count
    return slice(process_index * size, (process_index + 1) * size)


def _check_numbers(batch_size: int, seed: int, process_index: int, process_count: int) -> None:
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index must be from 0 to process_count - 1, got {process_index} of {process_count}")
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(f"batch_size must be a multiple of process_count {process_count}, got {batch_size}")
    if not 0 <= seed <= LARGEST:
        raise ValueError(f"seed must be from 0 to {LARGEST}, got {seed}")


def _state(**counts: int) -> State:
    return {name: np.int32(count) for name, count in counts.items()}


def _position(state: Mapping[str, Any], **wanted: int) -> tuple[int, int]:
    """Epoch and offset of a state, whose further entries must be those `wanted`."""
    if state.keys() != {"epoch", "offset", *wanted}:
        raise ValueError(f"the state must have the entries epoch, offset, {', '.join(wanted)}; got {sorted(state)}")
    for name, here in wanted.items():
        if int(state[name]) != here:
            raise ValueError(
                f"the state was saved with {name} {int(state[name])}, here it is {here}, so the order is another one; "
                "go on with the data and settings that the run began with, or begin a new run"
            )
    return int(state["epoch"]), int(state["offset"])
