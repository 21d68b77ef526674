"""Checkpoints on real disks: everything comes back, sharded as asked."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxkd import data
from jaxkd.training import sharding
from jaxkd.training.checkpoints import CheckpointError, Checkpoints, abstract_like


class _Source:
    info = data.SourceInfo(
        name="numbers",
        task="classification",
        class_names=("a", "b"),
        image_shape=(2, 2, 1),
    )
    groups = [str(i) for i in range(10)]

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return {
            "image": np.full((2, 2, 1), index, np.uint8),
            "label": np.array(0, np.int32),
        }


def _iterator():
    return iter(data.train_batches(_Source(), batch_size=2, seed=0, epochs=3))


def _state(scale=1.0):
    params = {"kernel": scale * jnp.arange(32.0).reshape(4, 8), "bias": jnp.ones(3)}
    return {
        "params": params,
        "opt_state": optax.adam(0.1).init(params),
        "half": jnp.full((2,), 1.5, jnp.bfloat16),
        "step": jnp.asarray(7, jnp.int32),
        "key": jax.random.key(3),
        "nothing": None,
    }


def _abstract(mesh, min_size=8):
    shapes = jax.eval_shape(_state)
    return abstract_like(
        shapes, sharding.state_sharding(shapes, mesh, min_size=min_size)
    )


def _equal(a, b):
    def same(x, y):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)

    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(same, a, b)


def test_state_iterator_and_record_come_back(tmp_path):
    iterator = _iterator()
    for _ in range(3):
        next(iterator)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, _state(), iterator, {"stage": "s", "clock": {"seconds": 1.5}})
    checkpoints.close()
    expected = next(iterator)["index"]
    iterator.close()

    fresh = _iterator()
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest() == 3
    mesh = sharding.make_mesh()
    state, record = checkpoints.restore(3, _abstract(mesh), fresh)
    checkpoints.close()
    _equal(state, _state())
    assert record == {"stage": "s", "clock": {"seconds": 1.5}}
    np.testing.assert_array_equal(next(fresh)["index"], expected)
    fresh.close()


def test_a_state_of_eight_devices_is_read_onto_two(tmp_path):
    wide = sharding.make_mesh(data=2, fsdp=4)
    shapes = jax.eval_shape(_state)
    state = jax.jit(
        _state, out_shardings=sharding.state_sharding(shapes, wide, min_size=8)
    )()
    assert not state["params"]["kernel"].sharding.is_fully_replicated
    iterator = _iterator()
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state, iterator, {})
    checkpoints.wait()
    narrow = sharding.make_mesh(data=1, fsdp=2, devices=jax.devices()[:2])
    restored, _ = checkpoints.restore(1, _abstract(narrow))
    checkpoints.close()
    iterator.close()
    assert restored["params"]["kernel"].sharding.mesh == narrow
    _equal(restored, _state())


def test_the_newest_and_the_best_stay(tmp_path):
    iterator = _iterator()
    checkpoints = Checkpoints(tmp_path, keep=1)
    scores = {1: 0.2, 2: 0.9, 3: None, 4: 0.5, 5: float("nan")}
    for step, score in scores.items():
        checkpoints.save(step, _state(step), iterator, {}, score=score)
        checkpoints.wait()
    assert checkpoints.latest() == 5
    assert checkpoints.best() == 2
    checkpoints.close()
    iterator.close()
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.isdigit()) == ["2", "5"]
    again = Checkpoints(tmp_path)
    assert (again.latest(), again.best()) == (5, 2)
    again.close()


def test_an_empty_folder_has_no_checkpoint(tmp_path):
    checkpoints = Checkpoints(tmp_path / "new")
    assert checkpoints.latest() is None
    assert checkpoints.best() is None
    checkpoints.close()


def test_what_a_killed_save_leaves_is_not_taken_for_a_checkpoint(tmp_path):
    iterator = _iterator()
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, _state(), iterator, {})
    checkpoints.close()
    (tmp_path / "2.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "2.orbax-checkpoint-tmp" / "half").write_text("x")
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest() == 1
    checkpoints.save(2, _state(2.0), iterator, {})
    checkpoints.wait()
    assert checkpoints.latest() == 2
    checkpoints.close()
    iterator.close()
    assert not list(tmp_path.glob("*tmp*"))


def test_saving_a_step_again_changes_nothing(tmp_path):
    iterator = _iterator()
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, _state(), iterator, {"first": True})
    checkpoints.wait()
    checkpoints.save(1, _state(2.0), iterator, {"first": False})
    checkpoints.wait()
    _, record = checkpoints.restore(1, _abstract(sharding.make_mesh()))
    checkpoints.close()
    iterator.close()
    assert record == {"first": True}


def test_arrays_of_another_shape_are_refused(tmp_path):
    iterator = _iterator()
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"x": jnp.ones((2, 3))}, iterator, {})
    checkpoints.wait()
    mesh = sharding.make_mesh()
    wrong = {
        "x": jax.ShapeDtypeStruct(
            (4, 3), jnp.float32, sharding=sharding.replicated(mesh)
        )
    }
    with pytest.raises(CheckpointError, match="shape"):
        checkpoints.restore(1, wrong)
    checkpoints.close()
    iterator.close()


def test_saving_without_a_score_says_nothing(tmp_path, caplog):
    iterator = _iterator()
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, _state(), iterator, {})
    checkpoints.close()
    iterator.close()
    assert not caplog.records


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_damaged_checkpoint_is_one_line_that_names_it(tmp_path, damage):
    iterator = _iterator()
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, _state(), iterator, {})
    checkpoints.wait()
    if damage == "missing":
        shutil.rmtree(tmp_path / "1" / "state")
    else:
        for file in (tmp_path / "1" / "state").rglob("*"):
            if file.is_file():
                file.write_bytes(file.read_bytes()[:7])
    with pytest.raises(CheckpointError) as error:
        checkpoints.restore(1, _abstract(sharding.make_mesh()))
    checkpoints.close()
    iterator.close()
    text = str(error.value)
    assert f"checkpoint {tmp_path / '1'} cannot be read" in text and "\n" not in text
    assert "delete that folder to go on from the one before" in text
