"""Order, sharding over processes, padding and exact resume of the pipelines."""

import pickle
import signal

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image

from jaxkd.data import DamagedFileError, eval_batches, load, train_batches
from jaxkd.data.arrays import ArraySource


def make_source(n, task="classification"):
    images = np.arange(n, dtype=np.uint8)[:, None, None, None] * np.ones(
        (1, 2, 3, 1), np.uint8
    )
    labels = np.arange(n) % 3
    if task == "segmentation":
        labels = np.broadcast_to(labels[:, None, None], (n, 2, 3))
    return ArraySource("numbers", images, labels, class_names=("a", "b", "c"))


def one_by_one(n):
    """A source that has no `take`, as sources that read files."""
    return _OneByOne(make_source(n))


class _OneByOne:
    def __init__(self, source):
        self._source = source
        self.info, self.groups = source.info, source.groups

    def __len__(self):
        return len(self._source)

    def __getitem__(self, index):
        return self._source[index]


def orders(batches):
    iterator = iter(batches)
    taken = [batch["index"] for batch in iterator]
    iterator.close()
    return np.stack(taken)


def test_each_epoch_is_a_fresh_permutation():
    batches = train_batches(make_source(12), batch_size=4, seed=0, epochs=5)
    epochs = orders(batches).reshape(5, 12)
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(12))
    assert len({tuple(epoch) for epoch in epochs}) == 5


def test_each_epoch_drops_its_own_remainder():
    batches = train_batches(make_source(10), batch_size=4, seed=1, epochs=6)
    assert batches.steps_per_epoch == 2
    assert len(batches) == 12
    epochs = orders(batches).reshape(6, 8)
    for epoch in epochs:
        assert len(set(epoch)) == 8
    dropped = [frozenset(range(10)) - set(epoch) for epoch in epochs]
    assert len(set(dropped)) > 1


def test_order_depends_on_the_seed_and_on_nothing_else():
    def order(seed, source=None):
        return orders(
            train_batches(source or make_source(9), batch_size=3, seed=seed, epochs=2)
        )

    np.testing.assert_array_equal(order(3), order(3))
    np.testing.assert_array_equal(order(3), order(3, one_by_one(9)))
    assert not np.array_equal(order(3), order(4))


def test_epoch_one_of_a_seed_is_not_epoch_zero_of_the_next_seed():
    # grain's own shuffle has that property, which is why the order is ours.
    first = orders(train_batches(make_source(64), batch_size=64, seed=0, epochs=2))
    second = orders(train_batches(make_source(64), batch_size=64, seed=1, epochs=1))
    assert not np.array_equal(first[1], second[0])


def test_positions_of_a_record_are_uniform_and_neighbours_independent():
    batches = train_batches(make_source(16), batch_size=16, seed=5, epochs=4000)
    perms = np.stack([batches.indices(step) for step in range(4000)])
    expected = 4000 / 16
    counts = np.stack([np.bincount(perms[:, i], minlength=16) for i in range(16)])
    # Chi-square with 225 degrees of freedom: mean 225, standard deviation 21.
    assert ((counts - expected) ** 2 / expected).sum() < 225 + 5 * 21
    steps = np.bincount(((perms[:, 1:] - perms[:, :-1]) % 16).ravel(), minlength=16)[1:]
    expected = steps.mean()
    # 14 degrees of freedom: mean 14, standard deviation 5.3.
    assert ((steps - expected) ** 2 / expected).sum() < 14 + 5 * 5.3


@pytest.mark.parametrize("task", ["classification", "segmentation"])
def test_batches_hold_the_records_of_their_indices(task):
    source = make_source(11, task)
    for batch in iter(train_batches(source, batch_size=5, seed=0, epochs=1)):
        assert batch.keys() == {"image", "label", "index"}
        assert batch["image"].shape == (5, 2, 3, 1)
        assert batch["image"].dtype == np.uint8
        assert batch["label"].dtype == np.int32
        assert batch["index"].dtype == np.int32
        np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], batch["index"])
        labels = batch["label"].reshape(5, -1)[:, 0]
        np.testing.assert_array_equal(labels, batch["index"] % 3)


def test_sources_without_take_give_the_same_batches():
    fast = list(iter(train_batches(make_source(7), batch_size=3, seed=0, epochs=2)))
    slow = list(iter(train_batches(one_by_one(7), batch_size=3, seed=0, epochs=2)))
    for a, b in zip(fast, slow, strict=True):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


def test_two_processes_share_each_global_batch_in_its_order():
    source = make_source(22)
    options = dict(batch_size=4, seed=2, epochs=3)
    whole = orders(train_batches(source, **options))
    parts = [
        orders(train_batches(source, **options, process_index=i, process_count=2))
        for i in range(2)
    ]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)
    for epoch in range(3):
        of_epoch = slice(epoch * 5, epoch * 5 + 5)
        assert not set(parts[0][of_epoch].ravel()) & set(parts[1][of_epoch].ravel())


@pytest.mark.parametrize("taken", [0, 1, 4, 7, 12])
def test_resume_is_exact_in_and_across_epochs(taken):
    # 10 records in batches of 4: two steps per epoch.
    batches = train_batches(make_source(10), batch_size=4, seed=7, epochs=6)
    unbroken = orders(batches)
    iterator = iter(batches)
    for _ in range(taken):
        next(iterator)
    state = iterator.get_state()
    iterator.close()
    resumed = iter(batches)
    resumed.set_state(state)
    rest = [batch["index"] for batch in resumed]
    resumed.close()
    np.testing.assert_array_equal(
        np.reshape(rest, (-1, 4)), unbroken[taken:].reshape(-1, 4)
    )


def test_going_back_to_an_earlier_state_repeats_the_batches():
    iterator = iter(train_batches(make_source(8), batch_size=2, seed=0, epochs=2))
    state = iterator.get_state()
    first = [next(iterator)["index"] for _ in range(5)]
    iterator.set_state(state)
    np.testing.assert_array_equal(first, [next(iterator)["index"] for _ in range(5)])
    iterator.close()


def test_worker_processes_keep_the_order_and_resume_exactly():
    source = make_source(10)
    options = dict(batch_size=4, seed=7, epochs=3)
    alone = orders(train_batches(source, **options))
    workers = iter(train_batches(source, **options, workers=2))
    taken = [next(workers)["index"] for _ in range(3)]
    state = workers.get_state()
    taken += [batch["index"] for batch in workers]
    np.testing.assert_array_equal(taken, alone)

    # The same state without workers, and with workers again from the middle.
    threads = iter(train_batches(source, **options))
    threads.set_state(state)
    np.testing.assert_array_equal([b["index"] for b in threads], alone[3:])
    threads.close()
    workers.set_state(state)
    np.testing.assert_array_equal([b["index"] for b in workers], alone[3:])
    workers.close()


def test_damage_that_a_worker_meets_is_named_here(tmp_path):
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        for i in range(4):
            Image.fromarray(np.full((4, 4), i, np.uint8)).save(
                tmp_path / label / f"{i}.png"
            )
    source = load("image_folder", split="train", path=tmp_path, test_fraction=0.1)
    for file in tmp_path.glob("*/*.png"):
        file.write_bytes(b"")
    batches = train_batches(source, batch_size=2, seed=0, epochs=1, workers=1)
    iterator = iter(batches)
    with pytest.raises(DamagedFileError, match=r"\d.png: it cannot be decoded"):
        next(iterator)
    iterator.close()


def test_the_state_can_be_kept_by_grain_and_orbax(tmp_path):
    batches = train_batches(make_source(10), batch_size=4, seed=7, epochs=2)
    iterator = iter(batches)
    next(iterator)
    with ocp.CheckpointManager(tmp_path / "checkpoints") as manager:
        manager.save(
            0, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(iterator))
        )
        manager.wait_until_finished()
        expected = next(iterator)["index"]
        restored = iter(batches)
        manager.restore(
            0,
            args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(restored)),
        )
    np.testing.assert_array_equal(next(restored)["index"], expected)
    iterator.close()
    restored.close()


def test_a_state_beyond_the_end_is_refused():
    iterator = iter(train_batches(make_source(4), batch_size=2, seed=0, epochs=1))
    with pytest.raises(ValueError, match="step 3 but there are only 2 steps"):
        iterator.set_state({"next_step": 3})
    iterator.close()


def test_a_closed_iterator_says_so():
    iterator = iter(train_batches(make_source(4), batch_size=2, seed=0, epochs=1))
    iterator.close()
    with pytest.raises(ValueError, match="closed"):
        next(iterator)


def test_the_pipeline_survives_pickling():
    batches = train_batches(make_source(10), batch_size=4, seed=7, epochs=2)
    copy = pickle.loads(pickle.dumps(batches))
    np.testing.assert_array_equal(copy[3]["index"], batches[3]["index"])


@pytest.mark.parametrize("index", [-1, 4])
def test_batches_by_number_end_with_the_last(index):
    batches = train_batches(make_source(4), batch_size=2, seed=0, epochs=2)
    with pytest.raises(IndexError, match="range\\(4\\)"):
        batches[index]


@pytest.mark.parametrize("batch_size", [1, 3, 4, 10, 16])
def test_evaluation_sees_every_record_once_in_order(batch_size):
    batches = list(eval_batches(make_source(10), batch_size=batch_size))
    assert {batch["image"].shape[0] for batch in batches} == {batch_size}
    valid = np.concatenate([batch["valid"] for batch in batches])
    index = np.concatenate([batch["index"] for batch in batches])
    assert valid.dtype == bool
    np.testing.assert_array_equal(index[valid], np.arange(10))
    # Padding repeats the last record and says so.
    assert set(index[~valid]) <= {9}
    np.testing.assert_array_equal(
        np.concatenate([b["image"][:, 0, 0, 0] for b in batches]), index
    )


def test_evaluation_over_processes_joins_to_the_whole():
    source = make_source(9)
    whole = list(eval_batches(source, batch_size=4))
    parts = [
        list(eval_batches(source, batch_size=4, process_index=i, process_count=4))
        for i in range(4)
    ]
    # The last batch holds one record: three processes have padding only.
    assert {len(part) for part in parts} == {len(whole)} == {3}
    for step, batch in enumerate(whole):
        for name, value in batch.items():
            joined = np.concatenate([part[step][name] for part in parts])
            np.testing.assert_array_equal(joined, value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(batch_size=11), "10 records, fewer than one batch of 11"),
        (dict(batch_size=0), "batch_size must be >= 1"),
        (dict(epochs=0), "epochs must be >= 1"),
        (dict(workers=-1), "workers must be >= 0"),
        (dict(seed=-1), "seed must be >= 0"),
        (dict(batch_size=3, process_count=2), "not divisible by 2 processes"),
        (dict(process_index=2, process_count=2), "process_index 2 is not in range"),
    ],
)
def test_impossible_arguments_end_in_one_line(options, message):
    with pytest.raises(ValueError, match=message) as error:
        train_batches(
            make_source(10), **{"batch_size": 2, "seed": 0, "epochs": 1, **options}
        )
    assert "\n" not in str(error.value)


def test_an_empty_source_cannot_be_evaluated():
    class Empty:
        info, groups = None, ()

        def __len__(self):
            return 0

        def __getitem__(self, index):
            raise IndexError(index)

    with pytest.raises(ValueError, match="no records"):
        eval_batches(Empty(), batch_size=2)


def test_records_of_different_shapes_are_named():
    class Ragged(_OneByOne):
        def __getitem__(self, index):
            record = self._source[index]
            if index == 2:
                record = {**record, "image": record["image"][:1]}
            return record

    with pytest.raises(ValueError, match="record 2 has image of shape .* image_size"):
        list(eval_batches(Ragged(make_source(4)), batch_size=4))


class _Extra:
    """Entries that tell who asked for them; picklable, for workers."""

    def __call__(self, epoch, indices):
        return {"epoch": np.full(len(indices), epoch), "asked": indices.copy()}


@pytest.mark.parametrize("process", [0, 1])
def test_further_entries_are_those_of_the_epoch_and_of_the_process(process):
    batches = train_batches(
        make_source(10),
        batch_size=4,
        seed=2,
        epochs=3,
        process_index=process,
        process_count=2,
        extra=_Extra(),
    )
    plain = train_batches(make_source(10), batch_size=4, seed=2, epochs=3)
    for step in range(len(batches)):
        batch, numbers = batches[step], batches.numbers(step)
        rows = plain[step]["index"][2 * process : 2 * process + 2]
        np.testing.assert_array_equal(batch["asked"], rows)
        assert batch["epoch"].tolist() == [step // 2] * 2
        assert batch["image"][:, 0, 0, 0].tolist() == rows.tolist()
        assert numbers.keys() == {"index", "epoch", "asked"}
        np.testing.assert_array_equal(numbers["asked"], rows)


class _TellsSignals(_OneByOne):
    """Labels say what a signal would do to whoever reads; picklable, for workers."""

    def __getitem__(self, index):
        ending = {signal.SIGINT, signal.SIGTERM}
        ignored = all(signal.getsignal(s) == signal.SIG_IGN for s in ending)
        held = bool(signal.pthread_sigmask(signal.SIG_BLOCK, ()) & ending)
        record = dict(self._source[index])
        return {**record, "label": np.int32(2 * held + ignored)}


def test_workers_ignore_signals_from_their_start_on():
    """And this process gets them again once its workers run."""
    source = _TellsSignals(make_source(8))
    iterator = iter(train_batches(source, batch_size=4, seed=0, epochs=1, workers=1))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    labels = [next(iterator)["label"] for _ in range(2)]
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
    iterator.close()
    assert (np.stack(labels) == 1).all()
