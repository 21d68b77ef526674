"""MEAL and MEAL V2: teachers, discriminators, and who follows which gradient."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxkd import distill, losses
from jaxkd.distill.meal import init_discriminator
from jaxkd.layers import Outputs


def network(seed, shapes):
    rng = np.random.default_rng(seed)
    taps = {
        tap: jnp.asarray(rng.standard_normal((2, *shape)), jnp.float32)
        for tap, shape in shapes.items()
    }
    logits = jnp.asarray(rng.standard_normal((2, 5)), jnp.float32)
    return Outputs(logits=logits, taps=taps)


@pytest.fixture
def run(classification):
    """A student and two teachers of other widths and sizes, two stages each."""
    return dataclasses.replace(
        classification,
        student=network(1, {"stage1": (4, 4, 4), "stage2": (2, 2, 6)}),
        teachers=(
            network(2, {"stage1": (4, 4, 8), "stage2": (2, 2, 12)}),
            network(3, {"stage1": (3, 3, 4), "stage2": (1, 1, 5)}),
        ),
    )


def layers_of(params):
    return [(params[f"dense{i}"]["kernel"], params[f"dense{i}"]["bias"]) for i in "012"]


def shapes(params):
    return [kernel.shape for kernel, _ in layers_of(params)]


def judged(params, student, teacher):
    d = [losses.discriminate(x, layers_of(params)) for x in (student, teacher)]
    return losses.discriminator_loss(*d)


@pytest.mark.parametrize(
    ("width", "reduction", "expected"),
    [
        (1000, 8, [(1000, 125), (125, 15), (15, 2)]),
        (64, 8, [(64, 8), (8, 1), (1, 2)]),
        (5, 8, [(5, 1), (1, 1), (1, 2)]),
        (12, 2, [(12, 6), (6, 3), (3, 2)]),
    ],
)
def test_widths_of_the_discriminator(width, reduction, expected):
    params = init_discriminator(jax.random.key(0), width, reduction)
    assert shapes(params) == expected


def test_meal_v2_compares_with_the_mean_of_the_teachers(run):
    method = distill.create("meal_v2", reduction=2)
    params, memory = run.init(method)
    assert memory == {} and shapes(params["discriminator"]) == [(5, 2), (2, 1), (1, 2)]
    terms = run.terms(method, state=(params, memory))
    logits = [teacher.logits for teacher in run.teachers]
    q = (jax.nn.softmax(logits[0]) + jax.nn.softmax(logits[1])) / 2
    similarity = losses.cross_entropy(run.student.logits, q)
    np.testing.assert_allclose(terms["similarity"], similarity, rtol=1e-5)
    mean = (logits[0] + logits[1]) / 2
    expected = judged(params["discriminator"], run.student.logits, mean)
    np.testing.assert_allclose(terms["discriminator"], expected, rtol=1e-5)
    assert method.weights == {
        "similarity": 1.0,
        "discriminator": 1.0,
        "dead_outputs": 0.0,
    }


def test_meal_v2_shows_the_discriminator_probabilities_on_demand(run):
    method = distill.create("meal_v2", discriminator_inputs="probabilities")
    params, memory = run.init(method)
    q = losses.mean_probabilities([t.logits for t in run.teachers])
    expected = judged(params["discriminator"], jax.nn.softmax(run.student.logits), q)
    terms = run.terms(method, state=(params, memory))
    np.testing.assert_allclose(terms["discriminator"], expected, rtol=1e-5)


def alive(params):
    """Discriminator parameters that are positive, so that no unit is dead."""
    return jax.tree.map(lambda x: jnp.abs(x) + 0.1, params)


@pytest.mark.parametrize("name", ["meal_v2", "meal"])
def test_reversal_turns_the_students_gradient_and_not_the_discriminators(run, name):
    student = jax.tree.map(jnp.abs, run.student)

    def gradients(adversarial):
        method = distill.create(name, adversarial=adversarial)
        params, memory = run.init(method)

        def total(params, student):
            inputs = run.inputs(student=student)
            return method.terms(params, memory, inputs)[0]["discriminator"].sum()

        return jax.grad(total, (0, 1))(alive(params), student)

    (params, published), (same, reversed_) = gradients("none"), gradients("grl")
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(same), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
    assert jnp.any(published.logits != 0)
    np.testing.assert_allclose(reversed_.logits, -published.logits, rtol=1e-5)


def test_dead_outputs_are_reported(run):
    method = distill.create("meal_v2")
    params, memory = run.init(method)
    dead = jax.tree.map(lambda x: -jnp.abs(x), params)
    dead["discriminator"]["dense2"]["bias"] = jnp.array([1.0, -1.0])
    state = (jax.tree.map(lambda x: x, dead), memory)
    np.testing.assert_array_equal(run.terms(method, state=state)["dead_outputs"], 0.5)


def test_meal_v2_on_stored_labels_needs_no_teacher(run):
    method = distill.create(
        "meal_v2", labels="stored", discriminator_inputs="probabilities"
    )
    assert method.num_teachers == 0
    target = jnp.array([[0.1, 0.2, 0.3, 0.4, 0.0], [1.0, 0.0, 0.0, 0.0, 0.0]])
    alone = dataclasses.replace(run, teachers=())
    with pytest.raises(ValueError, match="the batch has no 'target'"):
        alone.terms(method)
    stored = dataclasses.replace(alone, batch={**run.batch, "target": target})
    value = stored.terms(method)["similarity"]
    expected = losses.cross_entropy(run.student.logits, target)
    np.testing.assert_allclose(value, expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["meal_v2", "meal"])
def test_a_learning_rate_gives_the_discriminator_its_own_optimizer(name):
    assert distill.create(name).optimizers == {}
    method = distill.create(name, discriminator_learning_rate=0.5)
    assert method.optimizers.keys() == {"discriminator"}
    tx = method.optimizers["discriminator"]
    assert isinstance(tx, optax.GradientTransformation)
    state = tx.init(jnp.zeros(1))
    first, state = tx.update(jnp.ones(1), state)
    second, _ = tx.update(jnp.ones(1), state)
    np.testing.assert_allclose(jnp.concatenate([first, second]), [-0.5, -0.95])


def channel_means(tap, width):
    """What pooling to a width that divides the channels must give."""
    means = np.asarray(tap).mean(axis=(1, 2))
    return jnp.asarray(means.reshape(len(means), width, -1).mean(-1))


def test_meal_compares_one_teacher_at_every_depth(run):
    one = dataclasses.replace(run, teachers=run.teachers[:1])
    gamma, eta = (0.1, 0.2, 0.4), (1.0, 0.5, 0.25)
    method = distill.create("meal", gamma=gamma, eta=eta, similarity="l2")
    params, memory = one.init(method)
    discriminators = params["discriminator"]
    assert discriminators.keys() == {"stage1", "stage2", "logits"}
    student, teacher = one.student, one.teacher
    pairs = {
        tap: (
            channel_means(student.taps[tap], width),
            channel_means(teacher.taps[tap], width),
        )
        for tap, width in {"stage1": 4, "stage2": 6}.items()
    } | {"logits": (student.logits, teacher.logits)}
    terms = one.terms(method, state=(params, memory))
    similarity = sum(
        g * losses.meal_similarity(*pair, kind="l2")
        for g, pair in zip(gamma, pairs.values(), strict=True)
    )
    np.testing.assert_allclose(terms["similarity"], similarity, rtol=1e-4)
    told = sum(
        e * judged(discriminators[tap], *pair)
        for e, (tap, pair) in zip(eta, pairs.items(), strict=True)
    )
    np.testing.assert_allclose(terms["discriminator"], told, rtol=1e-4)


def test_meal_draws_every_teacher_equally_often(run):
    method = distill.create("meal", gamma=(0.0, 0.0, 1.0))
    state = run.init(method)
    each = [losses.meal_similarity(run.student.logits, t.logits) for t in run.teachers]

    @jax.jit
    def draw(key):
        return method.terms(*state, run.inputs().replace(key=key))[0]["similarity"]

    values = jax.vmap(draw)(jax.random.split(jax.random.key(0), 200))
    first = np.isclose(values, each[0][None], rtol=1e-5).all(1)
    second = np.isclose(values, each[1][None], rtol=1e-5).all(1)
    assert np.all(first ^ second)
    assert 70 < first.sum() < 130  # five standard deviations from 100


def test_meal_pools_to_the_narrowest_network_or_to_given_widths(run):
    params, _ = run.init(distill.create("meal"))
    assert shapes(params["discriminator"]["stage1"])[0] == (4, 2)
    assert shapes(params["discriminator"]["stage2"])[0] == (5, 2)
    method = distill.create("meal", widths=(10, 3))
    params, _ = run.init(method)
    assert shapes(params["discriminator"]["stage1"])[0] == (10, 5)
    assert all(jnp.all(jnp.isfinite(v)) for v in run.terms(method).values())


def test_meal_weighs_the_last_depths_as_its_code_does(run):
    """The last three of 0.001, 0.01, 0.05, 0.1, 1."""
    one = dataclasses.replace(run, teachers=run.teachers[:1])
    state = one.init(distill.create("meal"))
    value = one.terms(distill.create("meal"), state=state)["similarity"]
    same = distill.create("meal", gamma=(0.05, 0.1, 1.0))
    np.testing.assert_array_equal(value, one.terms(same, state=state)["similarity"])


def test_meals_teachers_normalise_by_the_batch_unless_told_otherwise():
    assert distill.create("meal").teacher_mode == "train"
    assert distill.create("meal", teacher_mode="eval").teacher_mode == "eval"
    assert distill.create("meal_v2").teacher_mode == "eval"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"gamma": (1.0,)}, ValueError, "gamma has 1 values; .* needs 3"),
        ({"eta": (1.0, 1.0)}, ValueError, "eta has 2 values; .* needs 3"),
        ({"widths": (4, 4, 4)}, ValueError, "widths has 3 values; .* needs 2"),
        ({"student_taps": ("stage1",)}, ValueError, "has 1 taps .stage1. and teacher"),
        ({"student_taps": ("stage7",)}, KeyError, "no tap 'stage7'"),
    ],
)
def test_meal_names_what_does_not_fit(run, options, error, message):
    with pytest.raises(error, match=message):
        run.init(distill.create("meal", **options))


def test_meal_has_no_default_weights_for_many_depths(run):
    deep = {f"stage{i}": (1, 1, 2) for i in range(1, 6)}
    other = dataclasses.replace(
        run, student=network(1, deep), teachers=(network(2, deep),)
    )
    with pytest.raises(ValueError, match="no default for 5 taps and the logits"):
        other.init(distill.create("meal"))


@pytest.mark.parametrize("name", ["meal_v2", "meal"])
def test_networks_need_the_same_classes_and_one_label_per_image(
    run, segmentation, name
):
    second = run.teachers[1].replace(logits=jnp.zeros((2, 7)))
    other = dataclasses.replace(run, teachers=(run.teachers[0], second))
    with pytest.raises(ValueError, match="have 7 classes and student logits 5"):
        other.init(distill.create(name))
    with pytest.raises(ValueError, match="the method needs a teacher"):
        dataclasses.replace(run, teachers=()).init(distill.create(name))
    with pytest.raises(ValueError, match="one label per image"):
        segmentation.init(distill.create(name))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("meal_v2", {"reduction": 0}, "reduction must be > 0, got 0"),
        ("meal_v2", {"labels": "stored"}, "stored labels are probabilities"),
        (
            "meal",
            {"discriminator_learning_rate": -1.0},
            "discriminator_learning_rate must be > 0",
        ),
    ],
)
def test_impossible_options_are_an_error(name, options, message):
    with pytest.raises(ValueError, match=message):
        distill.create(name, **options)
