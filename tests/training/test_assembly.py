"""What a stage runs on: variables made or read once, items, and the first state."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd.training import Plan, StopSignal, Workdir, make_setup, run
from jaxkd.training import assembly as assembly_lib
from jaxkd.training import runner as runner_lib
from jaxkd.training.assembly import Known, abstract_state, assemble, untrained


@pytest.fixture(scope="module")
def setup(stored_setup):
    return stored_setup()


def unreadable(name):
    raise AssertionError(f"{name} was read")


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_frozen_networks_are_made_and_others_read(setup):
    read = []
    known = Known(setup, lambda name: read.append(name) or {"params": jnp.ones(3)})
    same(known("teacher"), untrained(setup, "teacher"))
    assert not read
    for _ in range(2):
        assert known("student")["params"].tolist() == [1, 1, 1]
    assert read == ["student", "student"]


def test_what_is_kept_is_neither_made_nor_read(setup):
    known = Known(setup, unreadable)
    kept = {"params": jnp.zeros(2)}
    known.keep({"student": kept, "teacher": kept})
    assert known("student") is kept and known("teacher") is kept


def test_seeds_get_variables_of_their_own(stored_setup):
    several = stored_setup(seeds=(1, 5))
    kernels = untrained(several, "student")["params"]["head"]["kernel"]
    alone = untrained(stored_setup(seed=5), "student")["params"]["head"]["kernel"]
    assert kernels.shape == (2, *alone.shape)
    np.testing.assert_allclose(kernels[1], alone, rtol=1e-6)
    assert not np.array_equal(kernels[0], kernels[1])


@pytest.fixture
def assembly(setup):
    made = assemble(setup, setup.stages[0], Known(setup, unreadable))
    yield made
    made.close()


def test_the_first_state_is_the_stages_own_where_it_shall_live(setup, assembly):
    (stage,) = setup.stages
    state = assembly.begin(Known(setup, unreadable))
    own = jax.jit(stage.begin)(setup.seeds.keys(), {})
    same(state.params, own.params)
    for leaf, shape in zip(
        jax.tree.leaves(state), jax.tree.leaves(assembly.abstract), strict=True
    ):
        assert (leaf.shape, leaf.dtype) == (shape.shape, shape.dtype)
        assert leaf.sharding.is_equivalent_to(shape.sharding, leaf.ndim)
    abstract, shardings = abstract_state(setup, stage)
    assert jax.tree.leaves(abstract) == jax.tree.leaves(assembly.abstract)
    assert jax.tree.leaves(shardings) == jax.tree.leaves(assembly.shardings)


def test_items_follow_each_other_and_a_program_takes_them(setup, assembly):
    begun = assembly.begin(Known(setup, unreadable))
    first, then = assembly.items(1, begun), assembly.items(2, begun)
    assert [len(jax.tree.leaves(x)[0]) for x in (first, then)] == [1, 2]
    assert first["index"].shape == (1, 16)
    seen = [*np.asarray(first["index"]), *np.asarray(then["index"])]
    assert len(np.unique(np.concatenate(seen))) == 48
    args = assembly.arguments(begun, first)
    state, metrics = assembly.programs.prepare(*args)(*args)
    assert state.step == 1 and metrics["loss"].shape == (1,)
    assert set(metrics["terms"]) == {"ce", "kd"}


def test_an_assembly_that_fails_has_started_nothing(setup, monkeypatch):
    begun = []
    make_feed = assembly_lib.make_feed

    def watched(*args, **kwargs):
        feed = make_feed(*args, **kwargs)
        monkeypatch.setattr(feed, "items", lambda: begun.append("items"))
        return feed

    def failing(*args, **kwargs):
        raise ValueError("no place")

    monkeypatch.setattr(assembly_lib, "make_feed", watched)
    monkeypatch.setattr(assembly_lib, "live_sharding", failing)
    with pytest.raises(ValueError, match="no place"):
        assemble(setup, setup.stages[0], Known(setup, unreadable))
    assert not begun


# ----------------------------------------------------------------- where teachers live

WIDE = {"name": "network_of_stored:Network", "width": 512}
SPLIT = {"teacher": "sharded", "fsdp_min_size": 64}


def shapes_of(setup):
    """The shapes of the teacher's arrays that eight devices share."""
    variables = jax.eval_shape(setup.networks["teacher"].init, jax.random.key(0))
    return {x.shape for x in jax.tree.leaves(variables) if x.size >= 64}


def held(shapes):
    """Bytes on one device of all arrays of such shapes that anything still holds."""
    gc.collect()
    return sum(
        x.addressable_shards[0].data.nbytes
        for x in jax.live_arrays()
        if x.shape in shapes and len(x.sharding.device_set) == 8
    )


def whole(shapes, setup):
    variables = jax.eval_shape(setup.networks["teacher"].init, jax.random.key(0))
    leaves = [x for x in jax.tree.leaves(variables) if x.shape in shapes]
    return sum(x.size * x.dtype.itemsize for x in leaves)


def wide(stored_config, mesh):
    config = stored_config(mesh=mesh)
    config["networks"]["teacher"] = {**WIDE, "frozen": True}
    return config


@pytest.mark.parametrize(("mesh", "part"), [(SPLIT, 8), ({"teacher": "replicated"}, 1)])
def test_a_frozen_teacher_takes_what_its_parts_take(stored_config, mesh, part):
    setup = make_setup(Plan.from_config(wide(stored_config, mesh)))
    shapes, known = shapes_of(setup), Known(setup, unreadable)
    before = held(shapes)
    made = assemble(setup, setup.stages[0], known)
    assert held(shapes) - before == whole(shapes, setup) // part
    assert known("teacher") is made.teachers[0]
    same(made.teachers[0], untrained(setup, "teacher"))
    made.close()


def test_a_teacher_that_was_read_is_kept_in_parts_alone(stored_config):
    config = wide(stored_config, SPLIT)
    config["networks"]["teacher"] = WIDE
    config["run"] = ("teacher", "student")
    alone = {"method": {"ce": {}}, "epochs": 1, "optimizer": {"learning_rate": 0.05}}
    config["stages"]["teacher"] = alone
    setup = make_setup(Plan.from_config(config))
    shapes, read = shapes_of(setup), []
    known = Known(setup, lambda name: read.append(name) or untrained(setup, name))
    before = held(shapes)
    made = assemble(setup, setup.stages[1], known)
    assert held(shapes) - before == whole(shapes, setup) // 8
    assert read == ["teacher"]
    same(made.teachers[0], untrained(setup, "teacher"))
    made.close()


def test_a_run_holds_a_split_teacher_in_parts_alone(
    stored_config, tmp_path, monkeypatch
):
    config = wide(stored_config, SPLIT)
    config["networks"]["teacher"] = WIDE
    config["run"] = ("teacher", "student")
    alone = {"method": {"ce": {}}, "epochs": 1, "optimizer": {"learning_rate": 0.05}}
    config["stages"]["teacher"] = alone
    setup = make_setup(Plan.from_config(config))
    workdir = Workdir(tmp_path)
    workdir.claim(setup.plan)
    shapes, found = shapes_of(setup), {}
    before, original = held(shapes), runner_lib._Loop.run

    def watched(self, state, first_step):
        found[self.stage.name] = held(shapes) - before
        return original(self, state, first_step)

    monkeypatch.setattr(runner_lib._Loop, "run", watched)
    with StopSignal() as stop:
        run(setup, workdir, command="test", stop=stop)
    # The teacher's stage has its parameters, statistics and momenta, whole.
    assert found["teacher"] > whole(shapes, setup)
    assert found["student"] == whole(shapes, setup) // 8
