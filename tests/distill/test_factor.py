import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import distill, losses
from jaxkd.distill.factor import Paraphraser, Translator
from jaxkd.layers import Outputs


@pytest.fixture
def run(classification):
    """Two stages, of which only the last counts; 4 epochs of 2 steps."""
    rng = np.random.default_rng(0)

    def outputs(**shapes):
        taps = {
            name: jnp.asarray(rng.standard_normal((2, *shape)), jnp.float32)
            for name, shape in shapes.items()
        }
        return Outputs(logits=jnp.zeros((2, 5)), taps=taps)

    data = dataclasses.replace(classification.data, steps_per_epoch=2, epochs=4)
    return dataclasses.replace(
        classification,
        student=outputs(stage1=(4, 4, 2), stage2=(2, 2, 3)),
        teachers=(outputs(stage1=(4, 4, 2), stage2=(4, 4, 6), pooled=(6,)),),
        data=data,
    )


def test_paraphraser_and_translator_meet_at_the_factor(run):
    params, memory = jax.eval_shape(lambda: run.init(distill.create("ft", k=0.7)))
    shapes = jax.tree.map(jnp.shape, params)
    kernels = {name: conv["kernel"] for name, conv in shapes["paraphraser"].items()}
    assert kernels == {
        "encoder0": (3, 3, 6, 6),
        "encoder1": (3, 3, 6, 4),
        "encoder2": (3, 3, 4, 4),
        "decoder0": (3, 3, 4, 4),
        "decoder1": (3, 3, 4, 6),
        "decoder2": (3, 3, 6, 6),
    }
    translator = shapes["translator"]
    assert [translator[f"conv{i}"]["kernel"] for i in range(3)] == [
        (3, 3, 3, 3),
        (3, 3, 3, 4),
        (3, 3, 4, 4),
    ]
    assert memory["batch_stats"]["norm2"]["mean"].shape == (4,)


def test_initial_kernels_have_the_bounds_of_the_published_layers(run):
    params, _ = run.init(distill.create("ft"))
    paraphraser = params["paraphraser"]
    # Fans of transposed convolutions are counted over their outputs.
    for name, fan in {"encoder1": 9 * 6, "decoder1": 9 * 6, "decoder0": 9 * 3}.items():
        for x in paraphraser[name].values():
            assert jnp.max(jnp.abs(x)) <= fan**-0.5
        assert jnp.max(jnp.abs(paraphraser[name]["kernel"])) > 0.9 * fan**-0.5


@pytest.mark.parametrize(
    "options", [{}, {"p1": 4, "p2": 2}, {"variant": "paper", "p2": 2}]
)
def test_terms_are_the_loss_of_the_factors_and_the_reconstruction(run, options):
    method = distill.create("ft", **options)
    assert method.weights == {"ft": 200.0, "reconstruction": 1.0}
    params, memory = run.init(method)
    terms, new_memory = run.step(method, state=(params, memory))
    teacher = run.teacher.taps["stage2"]
    factor, rebuilt = Paraphraser(3).apply(
        {"params": params["paraphraser"]}, teacher, True
    )
    translated, updated = Translator(3).apply(
        {"params": params["translator"], **memory},
        run.student.taps["stage2"],
        True,
        mutable=["batch_stats"],
    )
    assert factor.shape == (2, 4, 4, 3)
    np.testing.assert_allclose(
        terms["ft"], losses.ft(translated, factor, **options), rtol=1e-5
    )
    error = np.square(np.asarray(rebuilt - teacher)).mean((1, 2, 3))
    np.testing.assert_allclose(terms["reconstruction"], error, rtol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, new_memory, updated)
    assert jnp.any(new_memory["batch_stats"]["norm0"]["mean"] != 0)


def test_each_part_learns_from_its_own_term(run):
    method = distill.create("ft")
    params, memory = run.init(method)

    def gradient(term):
        def value(params):
            return jnp.sum(run.terms(method, state=(params, memory))[term])

        grads = jax.grad(value)(params)
        return {
            part: any(bool(jnp.any(x != 0)) for x in jax.tree.leaves(tree))
            for part, tree in grads.items()
        }

    assert gradient("ft") == {"paraphraser": False, "translator": True}
    assert gradient("reconstruction") == {"paraphraser": True, "translator": False}


def test_factor_waits_for_the_warmup(run):
    plain, waiting = distill.create("ft"), distill.create("ft", warmup_epochs=2)
    state = run.init(plain)
    expected = run.terms(plain, state=state)
    for step, counts in [(0, False), (3, False), (4, True), (7, True)]:
        terms = run.terms(waiting, state=state, step=step)
        np.testing.assert_allclose(terms["ft"], counts * expected["ft"], rtol=1e-6)
        np.testing.assert_allclose(
            terms["reconstruction"], expected["reconstruction"], rtol=1e-6
        )


def test_the_parts_may_have_schedules():
    def stop(step):
        return 1.0 * (step < 10)

    method = distill.create("ft", factor=3.0, reconstruction=stop)
    assert method.weights["ft"] == 3.0
    assert method.weights["reconstruction"](9) == 1.0
    assert method.weights["reconstruction"](10) == 0.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0.0}, "k must be above 0 and at most 1, got 0.0"),
        ({"k": 1.5}, "k must be above 0 and at most 1, got 1.5"),
        ({"p1": 0}, "p1 must be > 0"),
        ({"p2": 0}, "p2 must be > 0"),
        ({"warmup_epochs": -1}, "warmup_epochs must be >= 0, got -1"),
    ],
)
def test_impossible_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        distill.create("ft", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0.1}, "k=0.1 leaves no channel of the 6 of tap 'stage2' .* 'teacher'"),
        ({"warmup_epochs": 4}, "the stage has 4 epochs: the term 'ft' would never"),
        ({"teacher_tap": "pooled"}, "'pooled' .* needs maps"),
    ],
)
def test_impossible_networks_are_one_line(run, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        run.init(distill.create("ft", **options))
    assert "\n" not in str(caught.value)
