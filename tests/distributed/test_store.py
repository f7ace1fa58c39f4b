"""The store of samples: durable, each given out once, whatever is cut off."""

import threading

import numpy as np
import pytest

from jaxrl_llm.distributed import SampleStore, audit, read_ledger


def fill(folder, count=4, key="a"):
    store = SampleStore(folder)
    for number in range(count):
        assert store.commit(key, {"tokens": np.arange(number)}, id=str(number), reward=number / 2, worker=number % 2)
    return store


def test_first_in_first_out_and_the_same_again(tmp_path):
    store = fill(tmp_path)
    given = store.fetch("a", 0, 2)
    assert [sample.id for sample in given.samples] == ["0", "1"]
    assert np.array_equal(given.samples[1].value["tokens"], [0]) and given.samples[1].reward == 0.5
    assert given.samples[1].facts["worker"] == 1
    assert [sample.id for sample in store.fetch("a", 1, 1).samples] == ["2"]
    assert store.fetch("a", 2, 2) is None and store.fetch("b", 0, 1) is None
    for again in (store, SampleStore(tmp_path)):  # of this process and of one that was started again
        assert [sample.id for sample in again.fetch("a", 0, 2).samples] == ["0", "1"]
        assert [line["id"] for line in again.waiting("a")] == ["3"]
    assert audit(tmp_path, "a") == ({"committed": 4, "fetched": 3, "waiting": 1, "dropped": 0}, [])


def test_a_second_commit_of_an_id_does_nothing(tmp_path):
    store = fill(tmp_path, 1)
    assert not store.commit("a", "other", id="0", reward=1.0)
    assert store.commit("b", "other", id="0", reward=1.0), "ids are those of a queue"
    store.fetch("a", 0, 1)
    assert not SampleStore(tmp_path).commit("a", "other", id="0", reward=1.0)
    assert audit(tmp_path, "a")[0]["committed"] == 1


def test_what_is_dropped_may_come_again(tmp_path):
    store = fill(tmp_path, 2)
    store.drop("a", "0", "stale")
    assert store.ids("a") == {"1"} and not (tmp_path / "a" / "0").exists()
    assert store.commit("a", "newer", id="0", reward=0.0)
    assert [sample.id for sample in store.fetch("a", 0, 2).samples] == ["1", "0"]
    assert audit(tmp_path, "a") == ({"committed": 3, "fetched": 2, "waiting": 0, "dropped": 1}, [])


def test_release_deletes_what_no_step_comes_back_to(tmp_path):
    store = fill(tmp_path)
    store.fetch("a", 0, 1)
    store.fetch("a", 1, 1)
    store.release("a", 1)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["1", "2", "3"]
    with pytest.raises(ValueError, match="samples of step 0 of 'a' were released"):
        store.fetch("a", 0, 1)
    with pytest.raises(ValueError, match="0 is missing, and a step is to be given it again"):
        SampleStore(tmp_path).fetch("a", 0, 1)
    assert SampleStore(tmp_path).fetch("a", 1, 1) is not None


def test_a_flipped_byte_is_found(tmp_path):
    store = fill(tmp_path, 1)
    path = tmp_path / "a" / "0"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="is damaged"):
        store.fetch("a", 0, 1)


def test_cut_off_anywhere_the_ledger_is_that_of_an_earlier_moment(tmp_path):
    store = fill(tmp_path / "whole", 3)
    store.fetch("a", 0, 2)
    lines = read_ledger(tmp_path / "whole")
    content = (tmp_path / "whole" / "ledger.jsonl").read_bytes()
    ledger = tmp_path / "cut" / "ledger.jsonl"
    ledger.parent.mkdir()
    for length in range(0, len(content) + 1, 7):
        ledger.write_bytes(content[:length])
        SampleStore(ledger.parent).close()
        kept = read_ledger(ledger.parent)
        assert kept == lines[: len(kept)] and len(kept) == content[:length].count(b"\n")


def test_many_threads_each_sample_once(tmp_path):
    store, given = SampleStore(tmp_path), []

    def push(first):
        for number in range(first, first + 10):
            store.commit("a", number, id=str(number % 25), reward=0.0)  # ids 15 to 24 come twice

    def pull(first):
        for step in range(first, first + 5):
            while (fetched := store.fetch("a", step, 2)) is None:
                pass
            given.extend(sample.id for sample in fetched.samples)

    threads = [threading.Thread(target=push, args=(first,)) for first in (0, 10, 15)]
    threads += [threading.Thread(target=pull, args=(first,)) for first in (0, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(given) == len(set(given)) == 20
    assert audit(tmp_path, "a")[1] == []


@pytest.mark.parametrize(
    "options, message",
    [
        ({"reward": None}, "sample '7' of 'a' has the reward None: score it first"),
        ({"reward": float("nan")}, "reward nan"),
        ({"id": "../7"}, r"id '../7': expected 1 to 100 of the characters"),
        ({"key": "a b"}, "key 'a b'"),
    ],
)
def test_bad_samples(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        SampleStore(tmp_path).commit(**{"key": "a", "value": 1, "id": "7", "reward": 1.0} | options)


def test_a_closed_store_says_so(tmp_path):
    store = fill(tmp_path, 1)
    store.close()
    with pytest.raises(ValueError, match="is closed"):
        store.fetch("a", 0, 1)


def test_the_audit_finds_what_is_wrong(tmp_path):
    store = fill(tmp_path, 3)
    store.fetch("a", 0, 1)
    (tmp_path / "a" / "2").unlink()
    with (tmp_path / "ledger.jsonl").open("a") as file:
        file.write('{"event": "fetched", "key": "a", "step": 1, "ids": ["0", "9"]}\n')
        file.write('{"event": "fetched", "key": "a", "step": 1, "ids": []}\n')
        file.write('{"event": "committed", "key": "a", "id": "0"}\n')
    assert audit(tmp_path, "a")[1] == [
        "step 1 is given 0, which is fetched",
        "step 1 is given 9, which is not committed",
        "step 1 is given samples a second time",
        "0 is committed again, though fetched",
        "2 waits, but its file is gone",
    ]
