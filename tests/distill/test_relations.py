import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxkd import distill, losses
from jaxkd.layers import Outputs

BATCH = 8
METHODS = ["sp", "cc", "rkd", "pkt"]


@pytest.fixture
def run(classification):
    """Two classifiers that differ in all their widths."""
    rng = np.random.default_rng(3)

    def outputs(size, channels):
        def random(*shape):
            return jnp.asarray(rng.standard_normal((BATCH, *shape)), jnp.float32)

        taps = {"stage1": random(2 * size, 2 * size, 3)}
        taps |= {"stage2": random(size, size, channels), "pooled": random(channels)}
        return Outputs(logits=random(5), taps=taps)

    return dataclasses.replace(
        classification,
        student=outputs(2, 4),
        teachers=(outputs(3, 6),),
        batch={"label": jnp.asarray(rng.integers(0, 5, BATCH), jnp.int32)},
        data=dataclasses.replace(classification.data, batch_size=BATCH),
    )


def test_sp_relates_the_last_stages(run):
    terms = run.terms(distill.create("sp"))
    expected = losses.sp(run.student.taps["stage2"], run.teacher.taps["stage2"])
    np.testing.assert_array_equal(terms["sp"], expected)


def test_taps_may_be_named(run):
    method = distill.create("sp", student_tap="stage1", teacher_tap="pooled")
    expected = losses.sp(run.student.taps["stage1"], run.teacher.taps["pooled"])
    np.testing.assert_array_equal(run.terms(method)["sp"], expected)


def test_rkd_and_pkt_relate_pooled_vectors(run):
    pair = run.student.taps["pooled"], run.teacher.taps["pooled"]
    terms = run.terms(distill.create("rkd"))
    np.testing.assert_array_equal(terms["distance"], losses.rkd_distance(*pair))
    np.testing.assert_array_equal(terms["angle"], losses.rkd_angle(*pair))
    terms = run.terms(distill.create("pkt", eps=1e-3))
    np.testing.assert_array_equal(terms["pkt"], losses.pkt(*pair, eps=1e-3))


def test_cc_embeds_both_sides(run):
    method = distill.create("cc", dim=7)
    params, memory = run.init(method)
    assert memory == {}
    assert params["embed_s"]["kernel"].shape == (4, 7)
    assert params["embed_t"]["kernel"].shape == (6, 7)
    student, teacher = (
        outputs.taps["pooled"] @ params[head]["kernel"] + params[head]["bias"][None]
        for outputs, head in ((run.student, "embed_s"), (run.teacher, "embed_t"))
    )
    terms = run.terms(method, state=(params, memory))
    np.testing.assert_allclose(terms["cc"], losses.cc(student, teacher), rtol=1e-5)


def test_cc_trains_its_heads_but_no_gradient_reaches_the_teacher(run):
    method = distill.create("cc", dim=3)
    params, memory = run.init(method)

    def total(params, teacher):
        inputs = run.inputs().replace(teachers=(teacher,))
        return method.terms(params, memory, inputs)[0]["cc"].sum()

    heads, teacher = jax.grad(total, (0, 1))(params, run.teacher)
    assert all(jnp.any(leaf != 0) for leaf in jax.tree.leaves(heads))
    assert all(jnp.all(leaf == 0) for leaf in jax.tree.leaves(teacher))


def test_cc_of_the_paper_has_no_heads(run):
    method = distill.create("cc", variant="rbf", factor=100.0, gamma=0.7)
    assert run.init(method) == ({}, {})
    expected = losses.cc_rbf(
        run.student.taps["pooled"], run.teacher.taps["pooled"], gamma=0.7
    )
    np.testing.assert_array_equal(run.terms(method)["cc"], expected)


def test_factors_are_weights_and_may_be_schedules():
    assert distill.create("sp").weights == {"sp": 3000.0}
    assert distill.create("cc").weights == {"cc": 0.02}
    assert distill.create("rkd").weights == {"distance": 25.0, "angle": 50.0}
    assert distill.create("pkt").weights == {"pkt": 30000.0}
    rising = distill.create("rkd", angle=lambda step: 2.0 * step)
    assert distill.weight_at(rising.weights["angle"], jnp.asarray(3)) == 6.0


@pytest.mark.parametrize("name", METHODS)
def test_a_batch_of_one_is_an_error(run, name):
    alone = dataclasses.replace(run, data=dataclasses.replace(run.data, batch_size=1))
    with pytest.raises(ValueError, match=f"{name!r} relates .* must be >= 2, got 1"):
        alone.init(distill.create(name))


@pytest.mark.parametrize("name", METHODS)
def test_networks_without_the_tap_are_errors(run, name):
    bare = dataclasses.replace(
        run, teachers=(Outputs(logits=jnp.zeros((8, 5)), taps={}),)
    )
    with pytest.raises(ValueError, match="network 'teacher' has no tap.*teacher_tap"):
        bare.init(distill.create(name))
    with pytest.raises(KeyError, match="network 'student' has no tap 'stage9'"):
        run.init(distill.create(name, student_tap="stage9"))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sp", {"factor": 0.0}, "factor must be > 0"),
        ("cc", {"dim": 0}, "dim must be > 0"),
        ("cc", {"gamma": -1.0}, "gamma must be > 0"),
        ("cc", {"variant": "rbf"}, "set factor for variant 'rbf'"),
        ("rkd", {"eps": 0.0}, "eps must be > 0"),
        ("pkt", {"eps": 0.0}, "eps must be > 0"),
        ("pkt", {"factor": -3.0}, "factor must be > 0"),
    ],
)
def test_impossible_options_are_errors(name, options, message):
    with pytest.raises(ValueError, match=message):
        distill.create(name, **options)


@pytest.mark.parametrize("name", METHODS)
def test_eight_devices_equal_one(run, name):
    """The batch that is related is the global one."""
    method = distill.create(name)
    state = run.init(method)

    @jax.jit
    def step(student, teacher):
        def total(student):
            inputs = run.inputs(student=student).replace(teachers=(teacher,))
            terms, _ = method.terms(*state, inputs)
            return sum(value.mean() for value in terms.values())

        return jax.value_and_grad(total)(student)

    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharded = NamedSharding(mesh, PartitionSpec("data"))
    networks = (run.student, run.teacher)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        step(*jax.device_put(networks, sharded)),
        step(*networks),
    )
