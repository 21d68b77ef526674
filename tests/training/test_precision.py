"""What `precision="bfloat16"` computes in which dtype, read off the step's own program.

Networks compute in bfloat16. Parameters, optimiser, running statistics, the reductions
inside norms and softmaxes, global pooling, classifiers and losses are float32.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import jaxprs_in_params

from jaxkd import models
from jaxkd.data import Augmentation
from jaxkd.distill import DataSpec, weighted
from jaxkd.training import from_linen, init_state, make_train_step

BFLOAT16, FLOAT32 = jnp.dtype("bfloat16"), jnp.dtype("float32")
FAMILIES = {
    "resnet": ("resnet8", {}, (4, 16, 16, 3)),
    "vit": ("deit_tiny", {"depth": 4, "patch_size": 4}, (4, 16, 16, 3)),
    "unet": ("unet", {"width_factor": 0.125}, (2, 32, 32, 1)),
    "unetpp": ("unetpp", {"width_factor": 0.125}, (2, 32, 32, 1)),
}
CLASSES = 7


def network(family, dtype=jnp.bfloat16):
    name, options, (_, *image) = FAMILIES[family]
    module = models.create(name, num_classes=CLASSES, dtype=dtype, **options)
    return from_linen(family, module, image)


@functools.cache
def traced_step(family):
    """The step of a student and a teacher of one family, as `jax.make_jaxpr` tells."""
    size, *image = FAMILIES[family][2]
    student, teacher = network(family), network(family)
    method, tx = weighted({"ce": 0.5, "kd": 0.5}), optax.adam(0.1)
    step = make_train_step(
        student=student.apply,
        teachers=[teacher.apply],
        method=method,
        tx=tx,
        schedule=lambda s: jnp.float32(0.1),
        augmentation=Augmentation(),
        num_classes=CLASSES,
        steps_per_epoch=4,
        epochs=1,
        ema=0.9,
    )
    data = DataSpec(
        records=8, num_classes=CLASSES, batch_size=size, steps_per_epoch=4, epochs=1
    )

    def state():
        return init_state(
            jax.random.key(0),
            student=student,
            method=method,
            teachers=(teacher,),
            tx=tx,
            data=data,
            ema=0.9,
        )

    dense = len(student.spec.logits) == 3
    batch = {
        "image": jax.ShapeDtypeStruct((size, *image), jnp.float32),
        "label": jax.ShapeDtypeStruct((size, *image[:2] * dense), jnp.int32),
        "index": jax.ShapeDtypeStruct((size,), jnp.int32),
    }
    teachers = (jax.eval_shape(teacher.init, jax.random.key(0)),)
    args = jax.eval_shape(state), batch, teachers
    return jax.make_jaxpr(step, return_shape=True)(*args)


def equations(jaxpr):
    """All equations, those of inner programs included."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


def dtypes(variables):
    return {v.aval.dtype for v in variables}


def is_classifier(equation):
    return "head" in str(equation.source_info.name_stack)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_product_of_a_network_has_narrow_operands(family):
    program, _ = traced_step(family)
    products = [
        e
        for e in equations(program.jaxpr)
        if e.primitive.name in ("conv_general_dilated", "dot_general")
    ]
    wide = [e for e in products if dtypes(e.invars) != {BFLOAT16}]
    # Classifiers of pooled features are float32 on purpose; those of pixels are not.
    largest = 0 if family.startswith("unet") else FAMILIES[family][2][0] * 256
    for equation in wide:
        assert is_classifier(equation), equation
        rows = math.prod(equation.invars[0].aval.shape[:-1])
        assert rows <= 256 and equation.invars[0].aval.size <= largest, equation
    # Forward of both networks, and two products backward for each of the student's.
    assert len(products) - len(wide) > 20


@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_and_normalisers_are_float32(family):
    program, _ = traced_step(family)

    def sensitive(equation):
        if equation.primitive.name in ("reduce_sum", "reduce_max"):
            # Over channels or classes; sums over rows are gradients of biases.
            return equation.invars[0].aval.ndim - 1 in equation.params["axes"]
        return equation.primitive.name in ("rsqrt", "log", "log1p")

    found = [e for e in equations(program.jaxpr) if sensitive(e)]
    assert {e.primitive.name for e in found} >= {"rsqrt", "log", "reduce_sum"}
    assert all(BFLOAT16 not in dtypes(e.invars) for e in found)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_state_and_the_metrics_are_float32(family):
    _, (state, metrics) = traced_step(family)
    kept = [x.dtype for x in jax.tree.leaves((state.replace(key=None), metrics))]
    assert {d for d in kept if jnp.issubdtype(d, jnp.floating)} == {FLOAT32}


@pytest.mark.parametrize("family", FAMILIES)
def test_no_large_activation_is_kept_in_float32(family):
    """What the pullback of the student holds for the backward pass."""
    student = network(family)
    variables = jax.eval_shape(student.init, jax.random.key(0))
    images = jax.ShapeDtypeStruct(FAMILIES[family][2], jnp.float32)

    def pullback(params, images):
        rest = {k: v for k, v in variables.items() if k != "params"}
        stored = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), rest)

        def logits(params):
            inputs = {"params": params, **stored}
            return student.apply(inputs, images, train=True, key=None)[0].logits

        return jax.vjp(logits, params)[1]

    kept = jax.tree.leaves(jax.eval_shape(pullback, variables["params"], images))
    params = {x.shape for x in jax.tree.leaves(variables["params"])}
    wide = [x for x in kept if x.dtype == FLOAT32 and x.shape not in params]
    narrow = [x for x in kept if x.dtype == BFLOAT16]
    batch = images.shape[0]
    # Statistics of tokens and pooled features: per token or per image, not both.
    assert all(x.size <= batch * 256 for x in wide), wide
    assert sum(x.size for x in wide) < 0.02 * sum(x.size for x in narrow)


def test_narrow_networks_learn_what_wide_ones_learn():
    """The gradient of the student's loss, against float32."""
    family = "resnet"
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.normal(size=FAMILIES[family][2]), jnp.float32)
    labels = jnp.arange(images.shape[0]) % CLASSES
    variables = network(family).init(jax.random.key(0))

    def gradient(dtype):
        student = network(family, dtype)

        def loss(params):
            inputs = {**variables, "params": params}
            outputs, _ = student.apply(inputs, images, train=True, key=None)
            return optax.softmax_cross_entropy_with_integer_labels(
                outputs.logits, labels
            ).mean()

        return jax.jit(jax.grad(loss))(variables["params"])

    narrow, wide = (
        jnp.concatenate([g.ravel() for g in jax.tree.leaves(gradient(dtype))])
        for dtype in (jnp.bfloat16, jnp.float32)
    )
    cosine = jnp.vdot(narrow, wide) / jnp.linalg.norm(narrow) / jnp.linalg.norm(wide)
    assert float(cosine) > 0.99
    assert float(jnp.linalg.norm(narrow) / jnp.linalg.norm(wide)) == pytest.approx(
        1, abs=0.05
    )
