"""The train step: what it computes, where it runs, and what it must not do."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxkd.data import Augmentation
from jaxkd.distill import Method, compose, weighted
from jaxkd.training import make_eval_step, make_train_step, optimizers, sharding
from jaxkd.training.start import augmentation_key, final_variables


def _close(a, b, rtol=2e-5, atol=2e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol, atol), a, b)


def _arrays(state):
    """The state without its key, as NumPy."""
    return jax.device_get(state.replace(key=jnp.zeros(())))


def test_one_step_is_gradient_descent_on_the_mean_cross_entropy(make_kit, batch):
    kit = make_kit(norm=False, momentum=0.0)
    state = kit.state()
    images = jnp.asarray(batch["image"])

    def loss(params):
        outputs, _ = kit.student.apply({"params": params}, images, train=True, key=None)
        return optax.softmax_cross_entropy_with_integer_labels(
            outputs.logits, batch["label"]
        ).mean()

    params = state.params["network"]
    value, grads = jax.value_and_grad(loss)(params)
    new_state, metrics = jax.jit(kit.step)(state, batch, ())
    _close(
        new_state.params["network"],
        jax.tree.map(lambda p, g: p - 0.1 * g, params, grads),
    )
    assert float(metrics["loss"]) == pytest.approx(float(value), rel=1e-6)
    assert float(metrics["grad_norm"]) == pytest.approx(
        float(optax.tree.norm(grads)), rel=1e-5
    )
    assert int(new_state.step) == 1


def test_the_loss_is_the_weighted_sum_of_the_logged_terms(make_kit, batch):
    kit = make_kit(weighted({"ce": 0.1, "kd": 0.9}))
    _, metrics = jax.jit(kit.step)(kit.state(), batch, kit.teacher_variables())
    terms = metrics["terms"]
    assert set(terms) == {"ce", "kd"}
    assert float(metrics["loss"]) == pytest.approx(
        0.1 * float(terms["ce"]) + 0.9 * float(terms["kd"]), rel=1e-6
    )


def test_a_weight_that_is_a_schedule_changes_with_the_step(make_kit, batch):
    kit = make_kit(weighted({"ce": lambda step: 1.0 + step.astype(jnp.float32)}))
    step = jax.jit(kit.step)
    state, first = step(kit.state(), batch, ())
    _, second = step(state, batch, ())
    assert float(first["loss"]) == pytest.approx(float(first["terms"]["ce"]))
    assert float(second["loss"]) == pytest.approx(2 * float(second["terms"]["ce"]))


def test_the_teacher_runs_in_evaluation_mode_and_gets_no_gradient(make_kit, batch):
    kit = make_kit(weighted({"kd": 1.0}))
    batch = jax.tree.map(jnp.asarray, batch)
    teacher_variables = kit.teacher_variables()
    state = kit.state()

    def loss(variables):
        return kit.step(state, batch, variables)[1]["loss"]

    gradient = jax.grad(loss, allow_int=True)(teacher_variables)
    assert all(not np.any(g) for g in jax.tree.leaves(gradient))
    images = batch["image"]
    expected, _ = kit.teachers[0].apply(
        teacher_variables[0], images, train=False, key=None
    )
    student, _ = kit.student.apply(state.variables(), images, train=True, key=None)
    log_q = jax.nn.log_softmax(expected.logits / 4)
    log_p = jax.nn.log_softmax(student.logits / 4)
    kd = 16 * (jnp.exp(log_q) * (log_q - log_p)).sum(-1).mean()
    assert float(loss(teacher_variables)) == pytest.approx(float(kd), rel=1e-4)


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_gradients_equal_those_of_the_full_batch(make_kit, batch, parts):
    whole, split = make_kit(norm=False), make_kit(norm=False, accumulate=parts)
    a, metrics_a = jax.jit(whole.step)(whole.state(), batch, ())
    b, metrics_b = jax.jit(split.step)(split.state(), batch, ())
    _close(a.params, b.params)
    _close(metrics_a, metrics_b)


def test_accumulation_updates_batch_statistics_once_per_part(make_kit, batch):
    kit = make_kit(accumulate=2)
    state, _ = jax.jit(kit.step)(kit.state(), batch, ())
    collections = kit.state().collections
    variables, images = kit.state().variables(), jnp.asarray(batch["image"])
    for part in (slice(0, None, 2), slice(1, None, 2)):
        _, collections = kit.student.apply(
            {**variables, **collections}, images[part], train=True, key=None
        )
    _close(state.collections, collections)


def test_the_running_average_follows_params_and_statistics(make_kit, batch):
    kit = make_kit(ema=0.75)
    state = kit.state()
    before = jax.device_get(state.average)
    new_state, _ = jax.jit(kit.step)(state, batch, ())
    _close(
        new_state.average,
        jax.tree.map(lambda a, v: 0.75 * a + 0.25 * v, before, new_state.variables()),
    )
    assert final_variables(new_state, kit.method) is new_state.average
    plain = make_kit().state()
    _close(final_variables(plain, kit.method), plain.variables())


@pytest.mark.parametrize(("data", "fsdp"), [(8, 1), (2, 4)])
def test_eight_simulated_devices_give_the_numbers_of_one(make_kit, batch, data, fsdp):
    kit = make_kit(
        weighted({"ce": 0.5, "kd": 0.5}),
        augmentation=Augmentation(flip="horizontal", pad_crop=1),
        ema=0.9,
    )
    results = []
    for mesh in (
        sharding.make_mesh(devices=jax.devices()[:1]),
        sharding.make_mesh(data=data, fsdp=fsdp),
    ):
        shapes = jax.eval_shape(kit.state)
        shardings = sharding.state_sharding(shapes, mesh, min_size=8)
        state = jax.jit(kit.state, out_shardings=shardings)()
        teachers = jax.device_put(kit.teacher_variables(), sharding.replicated(mesh))
        step = jax.jit(
            kit.step,
            donate_argnums=0,
            out_shardings=(shardings, sharding.replicated(mesh)),
        )
        for _ in range(3):
            state, metrics = step(state, sharding.put_batch(batch, mesh), teachers)
        results.append((_arrays(state), jax.device_get(metrics)))
        if fsdp > 1 and mesh.size > 1:
            kernel = state.params["network"]["Conv_0"]["kernel"]
            assert kernel.sharding.spec[-1] == "fsdp"
            moments = state.opt_state[0].trace["network"]["Conv_0"]["kernel"]
            assert moments.sharding == kernel.sharding
    _close(results[0], results[1], rtol=1e-4, atol=1e-5)


def test_the_state_is_donated(make_kit, batch):
    kit = make_kit()
    state = kit.state()
    jax.jit(kit.step, donate_argnums=0)(state, batch, ())
    assert state.params["network"]["Conv_0"]["kernel"].is_deleted()


def test_the_step_is_traced_once_and_never_talks_to_the_host(make_kit, batch):
    kit = make_kit(
        weighted({"ce": 0.1, "kd": 0.9}),
        augmentation=Augmentation(flip="both", pad_crop=1, mixup=0.2),
    )
    mesh = sharding.make_mesh()
    replicated = sharding.replicated(mesh)
    state = jax.device_put(kit.state(), replicated)
    teachers = jax.device_put(kit.teacher_variables(), replicated)
    batches = [sharding.put_batch(batch, mesh) for _ in range(3)]
    chex.clear_trace_counter()
    step = jax.jit(
        chex.assert_max_traces(kit.step, n=1), out_shardings=(replicated, replicated)
    )
    state, _ = step(state, batches[0], teachers)
    with jax.transfer_guard("disallow"):
        for one in batches[1:]:
            state, metrics = step(state, one, teachers)
    assert np.isfinite(float(metrics["loss"]))


def test_a_step_draws_by_its_number_alone(make_kit, batch):
    kit = make_kit(augmentation=Augmentation(flip="both", brightness=0.5))
    step = jax.jit(kit.step)
    state = kit.state()
    for _ in range(5):
        state, _ = step(state, batch, ())
    resumed = jax.tree.map(jnp.copy, state)
    a, _ = step(state, batch, ())
    b, _ = step(resumed, batch, ())
    jax.tree.map(np.testing.assert_array_equal, _arrays(a), _arrays(b))
    # The epoch moves on after four steps, and with it the augmentation.
    fresh, metrics_0 = step(kit.state(), batch, ())
    later, metrics_4 = step(kit.state().replace(step=jnp.asarray(4)), batch, ())
    assert float(metrics_0["loss"]) != float(metrics_4["loss"])


def test_taps_of_the_teacher_that_no_loss_reads_cost_nothing(make_kit, batch):
    def flops(expensive_tap):
        kit = make_kit(weighted({"kd": 1.0}), expensive_tap=expensive_tap)
        compiled = (
            jax.jit(kit.step)
            .lower(kit.state(), batch, kit.teacher_variables())
            .compile()
        )
        return compiled.cost_analysis()["flops"]

    # The unread convolution alone would be 2 * 16*8*8 * 7*7*4*256 = 103 MFLOP.
    assert flops(True) == pytest.approx(flops(False), rel=1e-3)
    assert flops(True) < 2 * 16 * 8 * 8 * 7 * 7 * 4 * 256


def test_the_evaluation_step_returns_probabilities(make_kit, batch):
    kit = make_kit()
    variables = kit.state().variables()
    evaluate = jax.jit(make_eval_step(kit.student.apply, Augmentation()))
    probabilities = evaluate(variables, batch)["probabilities"]
    images = jnp.asarray(batch["image"])
    outputs, _ = kit.student.apply(variables, images, train=False, key=None)
    assert probabilities.dtype == jnp.float32
    np.testing.assert_allclose(probabilities, jax.nn.softmax(outputs.logits), rtol=1e-6)
    np.testing.assert_allclose(probabilities.sum(-1), 1.0, rtol=1e-6)


class TestMechanisms:
    """What methods may ask of the step."""

    def _method(self, terms, **options):
        def init(key, specs):
            params = {"scale": jnp.ones(()), "critic": {"kernel": jnp.ones(2)}}
            return params, {"seen": jnp.zeros(())}

        options = {"weights": {"loss": 1.0}, **options}
        return Method(init=init, terms=terms, **options)

    def test_networks_run_on_every_view_and_batch_norms_see_all(self, make_kit, batch):
        seen = {}

        def terms(params, memory, inputs):
            seen["student"] = inputs.student.views["second"].logits
            seen["teacher"] = inputs.teacher.views["second"].logits
            difference = seen["student"] - seen["teacher"]
            return {"loss": jnp.mean(difference**2, -1)}, memory

        method = self._method(
            terms,
            views=("second",),
            num_teachers=1,
            prepare=lambda batch, key: {**batch, "image_second": -batch["image"]},
        )
        kit = make_kit(method)
        state, teachers = kit.state(), kit.teacher_variables()
        new_state, metrics = jax.jit(kit.step)(state, batch, teachers)
        variables, images = state.variables(), jnp.asarray(batch["image"])
        _, after = kit.student.apply(variables, images, train=True, key=None)
        student, after = kit.student.apply(
            {"params": variables["params"], **after}, -images, train=True, key=None
        )
        teacher, _ = kit.teachers[0].apply(teachers[0], -images, train=False, key=None)
        expected = jnp.mean((student.logits - teacher.logits) ** 2)
        np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
        _close(new_state.collections, {"batch_stats": after["batch_stats"]})

    def test_teachers_use_batch_statistics_if_the_method_says_so(self, make_kit, batch):
        def terms(params, memory, inputs):
            return {"loss": jnp.sum(inputs.teacher.logits**2, -1)}, memory

        losses = {}
        for mode in ("eval", "train"):
            kit = make_kit(self._method(terms, num_teachers=1, teacher_mode=mode))
            teachers = kit.teacher_variables()
            _, metrics = jax.jit(kit.step)(kit.state(), batch, teachers)
            outputs, _ = kit.teachers[0].apply(
                teachers[0],
                jnp.asarray(batch["image"]),
                train=mode == "train",
                key=None,
            )
            losses[mode] = float(metrics["loss"])
            expected = jnp.mean(jnp.sum(outputs.logits**2, -1))
            np.testing.assert_allclose(losses[mode], expected, rtol=1e-5)
        assert losses["eval"] != pytest.approx(losses["train"], rel=1e-3)

    def test_a_part_may_have_an_optimiser_of_its_own(self, make_kit, batch):
        def terms(params, memory, inputs):
            value = params["scale"] + 3.0 * params["critic"]["kernel"].sum()
            return {"loss": jnp.full(16, 1.0) * value}, memory

        own = {"critic": optax.sgd(0.01)}
        method = compose({"part": self._method(terms, optimizers=own)})
        assert list(method.optimizers) == ["part/critic"]
        kit = make_kit(method, momentum=0.0)
        kit.tx = optimizers.partitioned(kit.tx, method.optimizers)
        step = make_step(kit)
        state, _ = jax.jit(step)(kit.state(), batch, ())
        part = state.params["method"]["part"]
        np.testing.assert_allclose(part["critic"]["kernel"], 1.0 - 0.01 * 3.0)
        np.testing.assert_allclose(part["scale"], 1.0 - 0.1)

    def test_frozen_parameters_stay_and_get_no_gradient(self, make_kit, batch):
        kit = make_kit(momentum=0.0)

        def frozen(path):
            return path.startswith("Conv_0/")

        kit.tx = optimizers.partitioned(
            optax.chain(optax.add_decayed_weights(0.1), kit.tx), {}, frozen
        )
        state = kit.state()
        before = jax.device_get(state.params["network"])
        state, metrics = jax.jit(make_step(kit, frozen=frozen))(state, batch, ())
        after = jax.device_get(state.params["network"])
        _close(after["Conv_0"], before["Conv_0"], rtol=0, atol=0)
        assert not np.allclose(after["Dense_0"]["kernel"], before["Dense_0"]["kernel"])
        free, metrics_free = jax.jit(make_step(kit))(kit.state(), batch, ())
        assert float(metrics["grad_norm"]) < float(metrics_free["grad_norm"])

    def test_methods_are_told_the_epoch(self, make_kit, batch):
        def terms(params, memory, inputs):
            progress = inputs.progress
            epoch = progress.epoch + 100 * progress.epochs
            return {"loss": jnp.full(16, 1.0) * epoch}, memory

        kit = make_kit(self._method(terms))
        state, step = kit.state(), jax.jit(kit.step)
        values = []
        for _ in range(5):
            state, metrics = step(state, batch, ())
            values.append(float(metrics["loss"]))
        assert values == [500, 500, 500, 500, 501]

    def test_the_average_holds_what_the_readout_needs(self, make_kit, batch):
        def terms(params, memory, inputs):
            value = params["scale"] * jnp.ones(16)
            return {"loss": value}, {"seen": memory["seen"] + 1.0}

        def readout(params, memory, student):
            return student.logits * params["scale"] + memory["seen"]

        kit = make_kit(self._method(terms, readout=readout), ema=0.5, momentum=0.0)
        state, _ = jax.jit(kit.step)(kit.state(), batch, ())
        final = final_variables(state, kit.method)
        np.testing.assert_allclose(final["readout"]["params"]["scale"], 0.95)
        np.testing.assert_allclose(final["readout"]["memory"]["seen"], 1.0)
        plain = make_kit(self._method(terms, readout=readout)).state()
        assert "readout" in final_variables(plain, kit.method)


def make_step(kit, **options):
    """The step of a kit whose optimiser was changed."""
    return make_train_step(
        student=kit.student.apply,
        teachers=[t.apply for t in kit.teachers],
        method=kit.method,
        tx=kit.tx,
        schedule=lambda step: jnp.zeros(()),
        augmentation=Augmentation(),
        num_classes=3,
        steps_per_epoch=4,
        epochs=5,
        **options,
    )


def test_the_key_of_the_augmentation_is_known_before_there_is_a_state(make_kit, batch):
    """What labels images ahead of time draws as the steps will."""

    class Seen(Exception):
        """Ends the step; its argument is the key."""

    class Recorder:
        def train(self, batch, *, key, epoch, num_classes):
            raise Seen(jax.random.key_data(key))

    kit = make_kit(augmentation=Recorder())
    with pytest.raises(Seen) as seen:
        state = jax.jit(kit.state, static_argnums=0)(3)
        kit.step(state, jax.tree.map(jnp.asarray, batch), ())
    expected = augmentation_key(jax.random.key(3))
    np.testing.assert_array_equal(seen.value.args[0], jax.random.key_data(expected))
