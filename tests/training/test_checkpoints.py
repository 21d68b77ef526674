"""Checkpoints on real disks: everything comes back, sharded as asked."""

import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
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
        # The first of its items holds no array.
        "opt_state": optax.chain(optax.clip(1.0), optax.adam(0.1)).init(params),
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
        kernels = (state["params"]["kernel"], state["opt_state"][1][0].mu["kernel"])
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


def _whole(tree):
    """A tree of arrays or shapes as the target of a restore onto all devices."""
    shapes = jax.eval_shape(lambda: tree)
    everywhere = sharding.replicated(sharding.make_mesh())
    return abstract_like(shapes, jax.tree.map(lambda _: everywhere, shapes))


@pytest.fixture
def saved(tmp_path):
    """A manager with the state saved at steps 1 and 2."""
    iterator = _iterator()
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2):
        checkpoints.save(step, _state(step), iterator, {})
    checkpoints.wait()
    iterator.close()
    yield checkpoints
    checkpoints.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: {**s, "half": jnp.ones((4,), jnp.bfloat16)},
            r"'half' has the shape \(2,\) there and \(4,\) now",
        ),
        (lambda s: {**s, "later": jnp.ones(2)}, "it has no array 'later'"),
        (
            lambda s: {k: v for k, v in s.items() if k != "half"},
            "it has an array 'half', which is not there now",
        ),
        (
            lambda s: {**s, "opt_state": optax.sgd(0.1).init(s["params"])},
            "it has an array 'opt_state/1/0/count', which is not there now",
        ),
    ],
)
def test_another_state_is_told_apart_from_a_damaged_one(saved, change, message):
    with pytest.raises(CheckpointError, match=message) as error:
        saved.restore(2, _whole(change(_state())))
    text = str(error.value)
    assert "does not fit" in text and "take another --workdir" in text
    assert "delete" not in text and "\n" not in text
    _equal(saved.restore(2, _whole(_state()))[0], _state(2))


def test_a_part_is_read_alone_and_sharded_as_asked(saved, tmp_path):
    mesh = sharding.make_mesh(fsdp=8)
    abstract = _abstract(mesh)
    found = saved.restore_part(2, abstract, lambda path: path.startswith("params/"))
    _equal(found["params"], _state(2)["params"])
    assert found["params"]["kernel"].sharding.spec == P(None, "fsdp")
    rest = {k: v for k, v in found.items() if k != "params"}
    assert rest == {k: v for k, v in abstract.items() if k != "params"}
    assert isinstance(rest["opt_state"][1][0].mu["kernel"], jax.ShapeDtypeStruct)
    # The same manager still reads the whole, and random keys and bfloat16 in part.
    _equal(saved.restore(2, abstract)[0], _state(2))
    found = saved.restore_part(1, abstract, lambda path: path in ("key", "half"))
    _equal([found["key"], found["half"]], [_state()["key"], _state()["half"]])


def test_a_part_does_not_mind_what_is_left_on_the_disk(saved):
    changed = _state()
    changed["half"] = jnp.ones(5, jnp.bfloat16)
    found = saved.restore_part(2, _whole(changed), lambda path: path != "half")
    _equal(found["opt_state"], _state(2)["opt_state"])


def test_a_part_of_another_shape_is_refused_and_not_cut(saved):
    changed = _state()
    changed["params"]["kernel"] = jnp.ones((2, 8))
    with pytest.raises(CheckpointError, match="'params/kernel' has the shape"):
        saved.restore_part(2, _whole(changed), lambda path: "params" in path)
    with pytest.raises(CheckpointError, match="it has no array 'more'"):
        saved.restore_part(2, _whole({**_state(), "more": jnp.ones(2)}), bool)


def test_saving_without_a_score_says_nothing(tmp_path, caplog):
    iterator = _iterator()
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, _state(), iterator, {})
    checkpoints.close()
    iterator.close()
    assert not caplog.records


def _damage(folder, damage):
    if damage == "missing":
        shutil.rmtree(folder / "state")
        return
    for file in (folder / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:7])


@pytest.mark.parametrize("damage", ["missing", "truncated"])
@pytest.mark.parametrize("part", [False, True])
def test_a_damaged_checkpoint_is_one_line_that_names_it(saved, tmp_path, damage, part):
    def read(step):
        if part:
            return saved.restore_part(step, _whole(_state()), bool)
        return saved.restore(step, _whole(_state()))

    _damage(tmp_path / "2", damage)
    with pytest.raises(CheckpointError) as error:
        read(2)
    text = str(error.value)
    assert f"checkpoint {tmp_path / '2'} cannot be read" in text and "\n" not in text
    if not (part and damage == "missing"):
        assert "delete that folder to go on from step 1" in text
    # The last one is not given up, and deleting an older one would help nobody.
    _damage(tmp_path / "1", damage)
    for step in (1, 2):
        if step == 2:
            shutil.rmtree(tmp_path / "1")
        with pytest.raises(CheckpointError) as error:
            read(step)
        assert "delete" not in str(error.value)


def test_damaged_numbers_are_not_taken_for_another_state(saved, monkeypatch):
    def fail(*args, **kwargs):
        raise ValueError("OUT_OF_RANGE: byte range [0, 99) is not valid")

    monkeypatch.setattr(saved._manager, "restore", fail)
    monkeypatch.setattr(ocp.PyTreeCheckpointer, "restore", fail)
    whole = _whole(_state())
    for read in (
        lambda: saved.restore(2, whole),
        lambda: saved.restore_part(2, whole, lambda path: path == "half"),
    ):
        with pytest.raises(
            CheckpointError, match=r"cannot be read \(OUT_OF_RANGE.* 1$"
        ):
            read()


@pytest.mark.parametrize(
    "problem",
    [
        OSError(116, "Stale file handle"),
        MemoryError("no room"),
        ValueError("INTERNAL: Error reading 'd/x' [os_error_code='5']"),
    ],
)
def test_what_may_pass_is_no_reason_to_delete(saved, monkeypatch, problem):
    def fail(*args, **kwargs):
        try:
            raise problem
        except Exception as error:
            raise ValueError("a long story") from error

    monkeypatch.setattr(saved._manager, "restore", fail)
    with pytest.raises(CheckpointError) as error:
        saved.restore(2, _whole(_state()))
    text = str(error.value)
    assert str(problem) in text and "it may be whole" in text
    assert "delete" not in text and "run the same command again" in text


def test_what_the_devices_say_is_not_the_checkpoints_fault(saved, monkeypatch):
    def fail(*args, **kwargs):
        try:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
        except Exception as error:
            raise ValueError("a long story") from error

    for name, call in (
        ("restore", lambda: saved.restore(2, _whole(_state()))),
        ("wait_until_finished", saved.wait),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(saved._manager, name, fail)
            with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUST"):
                call()


def test_a_long_reason_keeps_its_end(saved, monkeypatch):
    def fail(*args, **kwargs):
        raise ValueError("begin " + "x" * 900 + "\n No space left on device")

    monkeypatch.setattr(saved._manager, "wait_until_finished", fail)
    with pytest.raises(CheckpointError, match="begin x* ... x* No space left") as error:
        saved.wait()
    assert len(str(error.value)) < 600 and "\n" not in str(error.value)


FULL = """
import resource, sys
import jax.numpy as jnp
import numpy as np
from pathlib import Path
from jaxkd.training.checkpoints import CheckpointError, Checkpoints

class Iterator:
    def get_state(self):
        return {"next_step": 0}

def save(step):
    state = {"x": jnp.asarray(np.random.default_rng(step).random((64, 1024)))}
    checkpoints.save(step, state, Iterator(), {})
    checkpoints.wait()

checkpoints = Checkpoints(Path(sys.argv[1]))
save(1)
# From here on no file may grow beyond 20 kB.
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
try:
    save(2)
except CheckpointError as error:
    print(error)
checkpoints.close()
"""


def test_a_disk_that_takes_no_more_is_one_line_and_costs_no_older_checkpoint(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith(f"cannot write a checkpoint to {tmp_path} (")
    assert "File too large" in line
    assert line.endswith("then the same command goes on from step 1")
    assert "Traceback" not in done.stderr
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest() == 1
    like = {"x": jax.ShapeDtypeStruct((64, 1024), jnp.float32)}
    state, _ = checkpoints.restore(1, _whole(like))
    checkpoints.close()
    expected = np.random.default_rng(1).random((64, 1024))
    np.testing.assert_allclose(state["x"], expected, rtol=1e-6)
