import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxkd import distill, losses
from jaxkd.distill.negatives import draw_negatives, draw_positives
from jaxkd.layers import Outputs

BATCH, RECORDS, DIM = 8, 24, 6
LABELS = np.random.default_rng(5).integers(0, 4, RECORDS).astype(np.int32)


@pytest.fixture
def run(classification):
    """Two classifiers on eight of 24 records."""
    rng = np.random.default_rng(4)

    def outputs(channels):
        logits, pooled = (
            jnp.asarray(rng.standard_normal((BATCH, width)), jnp.float32)
            for width in (4, channels)
        )
        return Outputs(logits=logits, taps={"pooled": pooled})

    index = rng.permutation(RECORDS)[:BATCH].astype(np.int32)
    data = distill.DataSpec(
        records=RECORDS,
        num_classes=4,
        batch_size=BATCH,
        steps_per_epoch=3,
        epochs=2,
        read_labels=lambda: LABELS,
    )
    return dataclasses.replace(
        classification,
        student=outputs(3),
        teachers=(outputs(5),),
        batch={"label": jnp.asarray(LABELS[index]), "index": jnp.asarray(index)},
        data=data,
    )


def crd(**options):
    return distill.create("crd", **{"negatives": 7, "dim": DIM, **options})


def init(run, method):
    return jax.jit(lambda key: method.init(key, run.specs))(jax.random.key(1))


def stepper(run, method):
    """A compiled step: `step(state, seed=2, number=0) -> (terms, new memory)`."""

    @jax.jit
    def step(state, seed=2, number=0):
        return method.terms(*state, run.inputs(seed=seed, step=number))

    return step


def with_data(run, **fields):
    return dataclasses.replace(run, data=dataclasses.replace(run.data, **fields))


def embed(run, params):
    return tuple(
        outputs.taps["pooled"] @ params[head]["kernel"] + params[head]["bias"][None]
        for outputs, head in ((run.student, "embed_s"), (run.teacher, "embed_t"))
    )


def test_state_has_heads_banks_and_tables(run):
    params, memory = init(run, crd(records=30))
    shapes = jax.tree.map(jnp.shape, (params, memory))
    assert shapes[0]["embed_s"] == {"kernel": (3, DIM), "bias": (DIM,)}
    assert shapes[0]["embed_t"] == {"kernel": (5, DIM), "bias": (DIM,)}
    assert shapes[1]["bank_s"] == shapes[1]["bank_t"] == (30, DIM)
    assert memory["z_s"] == memory["z_t"] == 0
    assert jnp.any(memory["bank_s"] != memory["bank_t"])
    bound = np.sqrt(3 / DIM)
    assert 0.9 * bound < jnp.abs(memory["bank_s"]).max() <= bound


def test_init_needs_no_arrays(run):
    abstract = jax.eval_shape(lambda key: crd().init(key, run.specs), jax.random.key(0))
    concrete = init(run, crd())
    assert jax.tree.map(jnp.shape, abstract) == jax.tree.map(jnp.shape, concrete)


@pytest.mark.parametrize("mode", ["exact", "relax"])
def test_a_step_is_the_loss_with_the_drawn_records(run, mode):
    method = crd(mode=mode, temperature=0.2, momentum=0.3)
    params, memory = init(run, method)
    terms, new = stepper(run, method)((params, memory))

    index = run.batch["index"]
    negative_key, positive_key = jax.random.split(run.inputs().key)
    others = draw_negatives(negative_key, memory["tables"], index, count=7)
    assert np.all(LABELS[others] != LABELS[index][:, None])
    positive = index
    if mode == "relax":
        positive = draw_positives(positive_key, memory["tables"], index)
        assert jnp.any(positive != index)
    records = jnp.concatenate([positive[:, None], others], axis=1)
    student, teacher = embed(run, params)
    arrays = (student, teacher, memory["bank_s"], memory["bank_t"], records)
    z_s, z_t = losses.crd_normalizers(*arrays, temperature=0.2)
    expected = losses.crd(*arrays, normalizers=(z_s, z_t), temperature=0.2)
    np.testing.assert_allclose(terms["crd"], expected, rtol=1e-5)
    np.testing.assert_allclose((new["z_s"], new["z_t"]), (z_s, z_t), rtol=1e-5)
    for name, embeddings in (("bank_s", student), ("bank_t", teacher)):
        bank = losses.update_bank(memory[name], embeddings, index, momentum=0.3)
        np.testing.assert_allclose(new[name], bank, rtol=1e-5, atol=1e-6)
        untouched = np.setdiff1d(np.arange(RECORDS), index)
        np.testing.assert_array_equal(new[name][untouched], memory[name][untouched])


def test_normalizers_are_set_by_the_first_step_only(run):
    method = crd()
    params, memory = init(run, method)
    step = stepper(run, method)
    _, first = step((params, memory), seed=1)
    terms, second = step((params, first))
    assert first["z_s"] > 0
    assert (second["z_s"], second["z_t"]) == (first["z_s"], first["z_t"])
    assert jnp.any(second["bank_s"] != first["bank_s"])
    # A fresh run with the same draws and banks would have set others.
    unset = {**first, "z_s": jnp.zeros(()), "z_t": jnp.zeros(())}
    again, _ = step((params, unset))
    assert jnp.any(again["crd"] != terms["crd"])


def test_negatives_change_with_the_key(run):
    state = init(run, crd())
    step = stepper(run, crd())
    one, other = (step(state, seed=seed)[0]["crd"] for seed in (1, 2))
    assert jnp.all(one != other)


def test_heads_are_trained_and_no_gradient_reaches_the_teacher(run):
    for method in (crd(), distill.create("crd_in_batch", dim=DIM)):
        params, memory = init(run, method)

        def total(params, teacher, method=method, memory=memory):
            inputs = run.inputs().replace(teachers=(teacher,))
            terms, _ = method.terms(params, memory, inputs)
            return sum(value.sum() for value in terms.values())

        heads, teacher = jax.jit(jax.grad(total, (0, 1)))(params, run.teacher)
        assert all(jnp.any(leaf != 0) for leaf in jax.tree.leaves(heads))
        assert all(jnp.all(leaf == 0) for leaf in jax.tree.leaves(teacher))


def test_temperature_may_be_a_schedule(run):
    state = init(run, crd())
    rising = crd(temperature=lambda step: 0.1 * step)
    scheduled, _ = stepper(run, rising)(state, number=2)
    fixed, _ = stepper(run, crd(temperature=0.2))(state)
    np.testing.assert_allclose(scheduled["crd"], fixed["crd"], rtol=1e-5)


def test_more_negatives_than_other_records_are_drawn_with_replacement(run):
    terms, _ = stepper(run, crd(negatives=100))(init(run, crd()))
    assert jnp.all(jnp.isfinite(terms["crd"]))


def test_crd_in_batch_contrasts_the_batch(run):
    method = distill.create("crd_in_batch", dim=DIM, temperature=0.3)
    params, memory = init(run, method)
    assert memory == {}
    expected = losses.crd_in_batch(
        *embed(run, params), run.batch["label"], temperature=0.3
    )
    terms, _ = stepper(run, method)((params, memory))
    np.testing.assert_allclose(terms["crd_in_batch"], expected, rtol=1e-5)


@pytest.mark.parametrize(
    "method", [crd(), distill.create("crd_in_batch", dim=DIM)], ids=["crd", "in_batch"]
)
def test_eight_devices_equal_one(run, method):
    """Loss, gradients and banks: embeddings and indices of all devices take part."""
    state = init(run, method)

    @jax.jit
    def differentiate(params, memory, student, teacher, batch):
        def total(params, student):
            inputs = run.inputs(student=student)
            inputs = inputs.replace(teachers=(teacher,), batch=batch)
            terms, new = method.terms(params, memory, inputs)
            return sum(value.mean() for value in terms.values()), new

        return jax.value_and_grad(total, (0, 1), has_aux=True)(params, student)

    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    batch = (run.student, run.teacher, run.batch)
    expected = differentiate(*state, *batch)
    sharded = jax.device_put(
        batch, NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    )
    # Banks lie whole on each device, or split by rows.
    for rows in (PartitionSpec(), PartitionSpec("fsdp")):
        placed = jax.device_put(state, NamedSharding(mesh, PartitionSpec()))
        for name in placed[1].keys() & {"bank_s", "bank_t"}:
            placed[1][name] = jax.device_put(state[1][name], NamedSharding(mesh, rows))
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
            differentiate(*placed, *sharded),
            expected,
        )


def test_a_bank_smaller_than_the_data_is_an_error(run):
    with pytest.raises(ValueError, match="records is 20, the data have 24"):
        run.init(crd(records=20))


def test_data_that_cannot_be_contrasted_are_errors(run):
    unlabelled = with_data(run, read_labels=None)
    with pytest.raises(ValueError, match="no single class"):
        unlabelled.init(crd())
    one_class = with_data(run, read_labels=lambda: np.zeros(RECORDS, np.int32))
    with pytest.raises(ValueError, match="the 24 training records have one class"):
        one_class.init(crd())


def test_a_batch_or_task_without_pairs_is_an_error(run, segmentation):
    method = distill.create("crd_in_batch")
    with pytest.raises(ValueError, match="batch_size must be >= 2, got 1"):
        with_data(run, batch_size=1).init(method)
    with pytest.raises(
        ValueError, match="needs one label per image; network 'student'"
    ):
        segmentation.init(method)


@pytest.mark.parametrize("name", ["crd", "crd_in_batch"])
def test_networks_without_the_tap_are_errors(run, name):
    bare = dataclasses.replace(run, student=Outputs(logits=run.student.logits, taps={}))
    with pytest.raises(ValueError, match="network 'student' has no tap 'pooled'"):
        bare.init(distill.create(name))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("crd", {"factor": 0.0}, "factor must be > 0"),
        ("crd", {"negatives": 0}, "negatives must be > 0"),
        ("crd", {"dim": 0}, "dim must be > 0"),
        ("crd", {"temperature": 0.0}, "temperature must be > 0"),
        ("crd", {"momentum": 1.5}, "momentum must be between 0 and 1"),
        ("crd_in_batch", {"factor": -1.0}, "factor must be > 0"),
        ("crd_in_batch", {"dim": -1}, "dim must be > 0"),
        ("crd_in_batch", {"temperature": 0.0}, "temperature must be > 0"),
    ],
)
def test_impossible_options_are_errors(name, options, message):
    with pytest.raises(ValueError, match=message):
        distill.create(name, **options)
