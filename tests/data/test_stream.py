"""A stream goes on exactly where it was stopped, and gives every record once an epoch to one process."""

import itertools
import json

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrl_llm.data.stream import (
    Stream,
    iterate_batches,
    next_batch,
    num_batches,
    permutation,
    state_at,
    stream_state,
)
from jaxrl_llm.train.checkpoints import Checkpoints


def take(stream, state, number):
    batches = []
    for _ in range(number):
        batch, state = next_batch(stream, state)
        batches.append(batch)
    return batches, state


def one(source, batch_size, **options):
    return Stream(source, batch_size, process_index=0, process_count=1, **options)


@given(size=st.integers(1, 12), per_process=st.integers(1, 4), processes=st.integers(1, 3), seed=st.integers(0, 5))
def test_every_record_once_an_epoch(size, per_process, processes, seed):
    streams = [
        Stream(range(size), per_process * processes, seed=seed, process_index=index, process_count=processes)
        for index in range(processes)
    ]
    number = 3 * size  # batches of all, so a whole number of epochs
    parts = [take(stream, stream_state(stream), number)[0] for stream in streams]
    assert all(len(batch) == per_process for part in parts for batch in part)
    together = [record for batches in zip(*parts, strict=True) for batch in batches for record in batch]
    epochs = np.reshape(together, (-1, size))
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(size), (len(epochs), 1)))
    alone = one(range(size), per_process * processes, seed=seed)
    batches, _ = take(alone, stream_state(alone), number)
    assert together == sum(batches, []), "the same order whatever the number of processes"


def test_stopped_at_any_step_it_goes_on_with_the_next_record(tmp_path):
    """11 records in batches of 4: the ends of epochs fall everywhere in a batch, and on its end at step 11."""
    stream = one(range(11), 4, seed=3)
    whole, _ = take(stream, stream_state(stream), 24)
    for stop in range(23):
        _, state = take(stream, stream_state(stream), stop)
        saved = json.loads(json.dumps({name: int(value) for name, value in state.items()}))
        assert take(one(range(11), 4, seed=3), saved, 24 - stop)[0] == whole[stop:]
        assert {name: int(value) for name, value in state_at(stream, stop).items()} == saved


def test_state_goes_through_a_checkpoint(tmp_path):
    stream = one(range(11), 4)
    whole, _ = take(stream, stream_state(stream), 6)
    _, state = take(stream, stream_state(stream), 3)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, {"stream": state})
    checkpoints.wait()
    step, restored = checkpoints.restore({"stream": stream_state(stream)})
    checkpoints.close()
    assert step == 3 and all(value.dtype == np.int32 for value in restored["stream"].values())
    assert take(stream, restored["stream"], 3)[0] == whole[3:]


def test_stopped_between_updates_on_one_batch():
    """Several updates a batch, stopped after any: every batch gets all its updates, in order."""
    stream, updates = one(range(10), 4), 3

    def run(position, number):
        state, inner = position
        seen = []
        for _ in range(number):
            batch, following = next_batch(stream, state)  # read again after a stop inside a batch
            seen.append((tuple(batch), inner))
            state, inner = (state, inner + 1) if inner + 1 < updates else (following, 0)
        return seen, (state, inner)

    whole, _ = run((stream_state(stream), 0), 20)
    for stop in range(20):
        first, position = run((stream_state(stream), 0), stop)
        assert first + run(position, 20 - stop)[0] == whole


def test_another_number_of_processes_or_batch_size():
    whole, _ = take(one(range(10), 1), stream_state(one(range(10), 1)), 40)
    flat = [record for batch in whole for record in batch]
    _, state = take(one(range(10), 4), stream_state(one(range(10), 4)), 3)
    for count in (2, 3):
        streams = [Stream(range(10), 6, process_index=index, process_count=count) for index in range(count)]
        parts = [take(stream, state, 4)[0] for stream in streams]
        assert [r for batches in zip(*parts, strict=True) for batch in batches for r in batch] == flat[12:36]


def test_order_is_of_seed_and_epoch():
    def epoch(seed, number, size=50):
        return take(one(range(size), size, seed=seed), state_at(one(range(size), size, seed=seed), number), 1)[0][0]

    orders = [tuple(epoch(seed, number)) for seed in (0, 1) for number in (0, 1)]
    assert len(set(orders)) == 4
    stays = one(range(5), 5, shuffle=False)
    assert take(stays, stream_state(stays), 2)[0] == [[0, 1, 2, 3, 4]] * 2
    # Fixed for good: a checkpoint of today must find its records with the NumPy of tomorrow.
    assert permutation(8, 0, 0).tolist() == [3, 2, 1, 6, 0, 7, 4, 5]
    # All 24 orders of 4 records come; 2000 draws give 83 each, with a standard deviation of 9.
    counts = np.unique([permutation(4, 7, e) for e in range(2000)], axis=0, return_counts=True)[1]
    assert len(counts) == 24 and counts.min() > 83 - 5 * 9


def test_the_end_is_an_error_and_not_a_run_without_steps():
    stream = one(range(10), 4, epochs=2)
    assert num_batches(stream) == 5
    batches, state = take(stream, stream_state(stream), 5)
    assert sorted(sum(batches, [])) == sorted([*range(10), *range(10)])
    with pytest.raises(ValueError, match="at its end: 20 records are taken.*raise epochs"):
        next_batch(stream, state)
    longer = one(range(10), 4, epochs=4)
    assert len(next_batch(longer, state)[0]) == 4
    with pytest.raises(ValueError, match="without end"):
        num_batches(one(range(10), 4))
    with pytest.raises(ValueError, match="fill no batch of 4"):
        num_batches(one(range(3), 4, epochs=1))


def test_states_of_other_data_and_bad_numbers():
    state = stream_state(one(range(10), 4))
    for other, message in [(one(range(11), 4), "size 10, here it is 11"), (one(range(10), 4, seed=1), "seed 0, here")]:
        with pytest.raises(ValueError, match=message):
            next_batch(other, state)
    with pytest.raises(ValueError, match="entries epoch, offset, seed, size; got"):
        next_batch(one(range(10), 4), {"epoch": 0})
    for arguments, message in [
        (([], 1, 0), "0 records"),
        (([1], 0, 0), "batch_size must be a multiple of process_count 2, got 0"),
        (([1], 3, 0), "multiple of process_count 2, got 3"),
        (([1], 2, -1), "seed must be"),
    ]:
        with pytest.raises(ValueError, match=message):
            Stream(*arguments, process_index=0, process_count=2)
    with pytest.raises(ValueError, match="process_index must be from 0"):
        Stream([1], 2, process_index=2, process_count=2)
    with pytest.raises(ValueError, match="epochs must be at least 1"):
        one([1], 1, epochs=0)
    assert Stream([1], 2).process_count == jax.process_count()


@given(
    size=st.integers(1, 12),
    batch_size=st.sampled_from([2, 4, 6]),
    window=st.sampled_from([1, 3, 5, 20]),
    stop=st.integers(1, 9),
)
def test_sources_that_are_read_from_the_beginning(size, batch_size, window, stop):
    def batches(state=None, **process):
        options = {"process_index": 0, "process_count": 1, **process}
        return iterate_batches(lambda: iter(range(size)), state, batch_size=batch_size, window=window, **options)

    whole = list(itertools.islice(batches(), 10))
    taken = [record for batch, _ in whole for record in batch]
    for start in range(0, len(taken) - size + 1, size):
        epoch = taken[start : start + size]
        for block in range(0, size, window):
            assert sorted(epoch[block : block + window]) == list(range(size))[block : block + window]
        assert window > 1 or epoch == list(range(size))
    state = whole[stop - 1][1]
    assert list(itertools.islice(batches(state), 10 - stop)) == whole[stop:]
    halves = [list(itertools.islice(batches(state, process_index=i, process_count=2), 10 - stop)) for i in (0, 1)]
    for (first, _), (second, _), (both, _) in zip(*halves, whole[stop:], strict=True):
        assert first + second == both


def test_what_can_be_wrong_with_such_a_source():
    def batches(size, state=None, **options):
        options = {"batch_size": 4, "process_index": 0, "process_count": 1, **options}
        return iterate_batches(lambda: iter(range(size)), state, **options)

    assert [batch for batch, _ in batches(5, epochs=2)] == [[0, 1, 2, 3], [4, 0, 1, 2]]
    *_, (_, last) = batches(8, epochs=1)
    for source, message in [
        (batches(8, last, epochs=1), "to the end of epochs=1 there are 0 records, too few"),
        (batches(3, epochs=1), "there are 3 records, too few for a batch of 4"),
        (batches(0), "gave 0 records in epoch 0"),
        (batches(5, last), "gave 5 records in epoch 0, of which the state has taken 8"),
        (batches(8, last, seed=1), "seed 0, here it is 1"),
        (batches(8, last, window=2), "window 1, here it is 2"),
        (batches(8, window=0), "window must be at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            next(source)
    assert next(batches(8, last, epochs=2))[0] == [0, 1, 2, 3]
