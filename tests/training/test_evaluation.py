"""Evaluation counts every record once, and starts no process that it does not need."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxkd.data import pipeline
from jaxkd.training.evaluation import Evaluation, displayable


class OnDisk:
    """The records of a source one by one, as if each were a file."""

    def __init__(self, source):
        self._source, self.info, self.groups = source, source.info, source.groups

    def __len__(self):
        return len(self._source)

    def __getitem__(self, index):
        return self._source[index]


@pytest.fixture(scope="module")
def setup(stored_setup):
    """Sixteen test records in memory, which two processes shall read."""
    made = stored_setup(data={"workers": 2}, evaluation={"batch_size": 24})
    assert made.plan.data.workers == 2
    return made


@pytest.fixture
def evaluate(setup, monkeypatch):
    """Evaluates the teacher on a source; returns the metrics and who would read."""
    real, network = pipeline.eval_batches, setup.networks["teacher"]
    variables = network.init(jax.random.key(0))

    def run(source):
        asked = []

        def eval_batches(source, *, workers, **options):
            asked.append(workers)
            return real(source, workers=0, **options)

        monkeypatch.setattr(pipeline, "eval_batches", eval_batches)
        evaluation = Evaluation(dataclasses.replace(setup, test=source))
        metrics = evaluation.metrics(network, variables)
        arrays = evaluation.judge(network, variables).predictions()
        return metrics, arrays, asked

    return run


def test_records_in_memory_are_read_without_processes(setup, evaluate):
    metrics, arrays, asked = evaluate(setup.test)
    assert asked == [0, 0]
    on_disk, same, asked = evaluate(OnDisk(setup.test))
    assert asked == [2, 2]
    assert metrics == on_disk
    jax.tree.map(np.testing.assert_array_equal, arrays, same)


def test_every_record_counts_once(setup, evaluate):
    # The one batch of 24 is filled up with copies of the last record.
    metrics, arrays, _ = evaluate(setup.test)
    assert arrays["index"].tolist() == list(range(len(setup.test)))
    assert arrays["confusion/teacher"].sum() == len(setup.test) == 16
    right = arrays["prediction/teacher"] == arrays["truth"]
    assert metrics["accuracy"] == pytest.approx(right.mean())


def test_pictures_keep_bytes_and_stretch_other_numbers():
    images = np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3)
    assert displayable(images) is images
    values = np.array([-1.0, 0.0, 1.0, 3.0]).reshape(1, 2, 2, 1)
    assert displayable(values).tolist() == [[[0, 64], [128, 255]]]
    assert not displayable(np.full((1, 2, 2, 1), 7.0)).any()
