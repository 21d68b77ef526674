"""Checkpoints on real disks: everything comes back, sharded as asked."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from jaxkd import data
from jaxkd.layers import Partition
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


RULES = Partition(rules={"kernel": (None, "model")}, units={})


def _shardings(mesh, min_size=8):
    shapes = jax.eval_shape(_state)
    splits = sharding.model_splits(shapes["params"], RULES, mesh)
    return sharding.state_sharding(shapes, mesh, min_size=min_size, splits=splits)


def _abstract(mesh):
    return abstract_like(jax.eval_shape(_state), _shardings(mesh))


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


def test_a_state_goes_from_mesh_to_mesh(tmp_path):
    one = sharding.make_mesh(devices=jax.devices()[:1])
    two = sharding.make_mesh(data=1, fsdp=2, devices=jax.devices()[:2])
    others = [
        (sharding.make_mesh(data=2, fsdp=2, model=2), P("fsdp", "model")),
        (two, P(None, "fsdp")),
        (one, P()),
    ]
    eight = sharding.make_mesh(fsdp=8)
    state = jax.jit(_state, out_shardings=_shardings(eight))()
    assert state["params"]["kernel"].sharding.spec == P(None, "fsdp")
    iterator = _iterator()
    checkpoints = Checkpoints(tmp_path, keep=9)
    for step, (mesh, spec) in enumerate(others, start=1):
        checkpoints.save(step, state, iterator, {})
        checkpoints.wait()
        state, _ = checkpoints.restore(step, _abstract(mesh))
        kernels = (state["params"]["kernel"], state["opt_state"][0].mu["kernel"])
        for kernel in kernels:
            assert kernel.sharding.mesh == mesh
            assert kernel.sharding.spec == spec
        _equal(state, _state())
    checkpoints.close()
    iterator.close()


def test_the_position_in_the_data_is_kept_once_for_all_processes(tmp_path):
    iterator = _iterator()
    next(iterator)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, _state(), iterator, {})
    checkpoints.close()
    iterator.close()
    files = {p.name: p for p in (tmp_path / "1" / "data").iterdir()}
    assert not [name for name in files if "process" in name]
    assert json.loads(files["metadata"].read_text()) == {"next_step": 1}


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
