import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxkd import distill
from jaxkd.layers import Outputs
from jaxkd.layers.critics import Critic


@pytest.fixture
def method():
    return distill.create("skd_holistic", width=4, image_channels=1)


@pytest.fixture
def run(segmentation):
    """Logits of 8x8, and images of another size."""

    def small(outputs):
        return Outputs(logits=outputs.logits[:, :8, :8], taps={})

    rng = np.random.default_rng(5)
    images = jnp.asarray(rng.standard_normal((2, 12, 12, 1)), jnp.float32)
    return dataclasses.replace(
        segmentation,
        student=small(segmentation.student),
        teachers=(small(segmentation.teacher),),
        batch={"image": images},
    )


def test_terms_reach_only_their_player(run, method):
    params, memory = run.init(method)
    names = ("student", "critic", "penalty")

    def means(params, student, teacher):
        inputs = run.inputs().replace(
            student=Outputs(logits=student, taps={}),
            teachers=(Outputs(logits=teacher, taps={}),),
        )
        terms, _ = method.terms(params, memory, inputs)
        return jnp.stack([jnp.mean(terms[name]) for name in names])

    arguments = params, run.student.logits, run.teacher.logits
    players = jax.jit(jax.jacrev(means, (0, 1, 2)))(*arguments)
    reached = [
        np.any([np.any(x.reshape(3, -1), axis=1) for x in jax.tree.leaves(player)], 0)
        for player in players
    ]
    # One row per player: the critic, the student, the teacher.
    np.testing.assert_array_equal(reached, [[0, 1, 1], [1, 0, 0], [0, 0, 0]])


def test_weights_multiply_the_penalty(method):
    assert method.weights == {"student": 0.1, "critic": 0.1, "penalty": 1.0}
    rising = distill.create(
        "skd_holistic", critic_factor=lambda step: 2.0 * step, penalty=3.0
    )
    assert distill.weight_at(rising.weights["penalty"], jnp.asarray(2)) == 12.0
    assert rising.weights["student"] == 0.1


def test_critic_term_is_the_difference_of_scores(run, method):
    params, memory = run.init(method)
    terms, moved = jax.jit(method.terms)(params, memory, run.inputs())
    images = jax.image.resize(
        run.batch["image"], (2, 8, 8, 1), "linear", antialias=False
    )

    @jax.jit
    def score(logits):
        variables = {"params": params["critic"], **memory}
        return Critic(4).apply(variables, jnp.concatenate([logits, images], -1), False)

    student, teacher = score(run.student.logits), score(run.teacher.logits)
    np.testing.assert_allclose(terms["student"], -student, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(terms["critic"], student - teacher, rtol=1e-4, atol=1e-6)
    # The power iteration of the spectral norm went on.
    before, after = jax.tree.leaves(memory), jax.tree.leaves(moved)
    assert all(bool(jnp.any(a != b)) for a, b in zip(after, before, strict=True))


def test_critic_learns_to_score_the_teacher_higher(run):
    method = distill.create("skd_holistic", width=4)
    params, memory = run.init(method)
    tx = optax.adam(3e-3)
    state = tx.init(params)

    @jax.jit
    def step(params, memory, state, i):
        def loss(params):
            inputs = run.inputs().replace(key=jax.random.key(i))
            terms, moved = method.terms(params, memory, inputs)
            gap = jnp.mean(terms["critic"])
            return gap + 10.0 * jnp.mean(terms["penalty"]), (gap, moved)

        grads, (gap, moved) = jax.grad(loss, has_aux=True)(params)
        updates, state_ = tx.update(grads, state)
        return optax.apply_updates(params, updates), moved, state_, gap

    first = None
    for i in range(60):
        params, memory, state, gap = step(params, memory, state, i)
        first = gap if first is None else first
    assert gap < min(float(first), 0.0) - 0.05


def test_critic_has_an_optimiser_of_its_own():
    method = distill.create(
        "skd_holistic", learning_rate=lambda step: 0.5 / (1 + step), weight_decay=0.1,
        momentum=0.0,
    )  # fmt: skip
    tx = method.optimizers["critic"]
    params = {"x": jnp.asarray(2.0)}
    updates, state = tx.update({"x": jnp.asarray(1.0)}, tx.init(params), params)
    assert float(updates["x"]) == pytest.approx(-0.5 * 1.2)
    updates, _ = tx.update({"x": jnp.asarray(1.0)}, state, params)
    assert float(updates["x"]) == pytest.approx(-0.25 * 1.2)


def test_spectral_norm_of_a_kernel_becomes_one():
    critic = Critic(4)
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    variables = critic.init(jax.random.key(1), x, False)
    apply = jax.jit(lambda v: critic.apply(v, x, True, mutable=["spectral"])[1])
    for _ in range(60):
        variables = {**variables, **apply(variables)}
    kernel = variables["params"]["conv0"]["kernel"].reshape(-1, 4)
    vector = variables["spectral"]["conv0"]["vector"]
    largest = np.linalg.svd(np.asarray(kernel), compute_uv=False)[0]
    assert float(jnp.linalg.norm(kernel @ vector)) == pytest.approx(largest, rel=1e-3)


def test_critic_halves_maps_down_to_four_pixels():
    assert [Critic.depth(n, 100) for n in (7, 8, 15, 16, 33, 65, 500)] == [
        0, 1, 1, 2, 3, 4, 4,
    ]  # fmt: skip
    x = jnp.zeros((1, 65, 70, 2))
    shapes = jax.eval_shape(lambda: Critic(8).init(jax.random.key(0), x, False))
    assert shapes["params"]["conv3"]["kernel"].shape == (4, 4, 32, 64)
    assert {"attention2", "attention3"} <= set(shapes["params"])
    assert math.prod(shapes["params"]["score"]["kernel"].shape) == 16 * 64


def test_errors_are_one_line(run, segmentation):
    tiny = dataclasses.replace(
        run,
        student=Outputs(logits=run.student.logits[:, :7], taps={}),
        teachers=(Outputs(logits=run.teacher.logits[:, :7], taps={}),),
    )
    with pytest.raises(ValueError, match=r"at least 8x8 .* 'student' has 7x8"):
        tiny.init(distill.create("skd_holistic"))
    with pytest.raises(ValueError, match="penalty must be >= 0, got -1"):
        distill.create("skd_holistic", penalty=-1.0)
    with pytest.raises(ValueError, match="learning_rate must be > 0"):
        distill.create("skd_holistic", learning_rate=0.0)
    colour = distill.create("skd_holistic", width=4, image_channels=3)
    with pytest.raises(ValueError, match="images have 1 channels and image_channels"):
        run.terms(colour)
