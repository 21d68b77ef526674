"""Sparse iso-FLOP training in the real step."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxkd import compression, distill
from jaxkd.compression import After, flatten
from jaxkd.data import Augmentation
from jaxkd.distill.method import DataSpec
from jaxkd.layers import BasicBlock, Outputs
from jaxkd.layers.convolution import Conv
from jaxkd.layers.dense import Dense
from jaxkd.models.mobilenetv2 import MobileNetV2
from jaxkd.models.vgg import VGG
from jaxkd.models.vit import VisionTransformer
from jaxkd.sparsity.sift_layers import folded
from jaxkd.sparsity.sift_network import Recipe, transform
from jaxkd.training import from_linen, init_state, make_train_step
from jaxkd.training.compressed import compressed, split

SHAPE = (8, 8, 3)


class Residual(nn.Module):
    """A stem, a block with a shortcut, a product without a norm, a classifier."""

    @nn.compact
    def __call__(self, images, *, train=False):
        x = Conv(8, (3, 3), padding=1, name="stem")(images)
        x = BasicBlock(16, stride=2, name="block")(x, train).mean((1, 2))
        x = nn.relu(Dense(16, name="hidden")(x))
        return Outputs(logits=Dense(4, name="head")(x), taps={"pooled": x})


def network(module=None):
    return from_linen("student", module or Residual(), SHAPE)


def student(family="parallel", *, of=None, **options):
    made = compression.create(
        "sparse_ift", family=family, **{"sparsity": 0.5, "any_cost": True, **options}
    )
    return compressed(of or network(), made, SHAPE)


def begin(learner, *, steps_per_epoch=4, epochs=2, seed=0, weight_decay=0.0):
    method = distill.create("ce")
    tx = optax.chain(
        optax.add_decayed_weights(weight_decay), optax.sgd(0.05, momentum=0.9)
    )
    data = DataSpec(
        records=8 * steps_per_epoch, num_classes=4, epochs=epochs,
        steps_per_epoch=steps_per_epoch, batch_size=8,
    )  # fmt: skip
    state = init_state(
        jax.random.key(seed), student=learner, method=method, teachers=(), tx=tx,
        data=data,
    )  # fmt: skip
    step = make_train_step(
        student=learner.apply, teachers=(), method=method, tx=tx,
        schedule=lambda step: jnp.float32(0.05), augmentation=Augmentation(),
        num_classes=4, steps_per_epoch=steps_per_epoch, epochs=epochs,
        upkeep=learner.upkeep,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    batch = {
        "image": jnp.asarray(rng.normal(size=(8, *SHAPE)), jnp.float32),
        "label": jnp.asarray(rng.integers(0, 4, 8), jnp.int32),
        "index": jnp.arange(8, dtype=jnp.int32),
    }
    return state, step, batch


def parts(state):
    own, _, memory = split(state.variables())
    return flatten(own["params"]), memory["masks"]


@pytest.mark.parametrize(
    ("family", "updates"),
    [("wide", "rigl"), ("parallel", "set"), ("factorized", "static"), ("doped", "rigl"),
     ("wide", "granet")],
)  # fmt: skip
def test_every_family_trains_in_the_step(family, updates):
    schedule = {} if updates == "static" else {"frequency": 1, "end": 1.0}
    learner = student(family, updates=updates, schedule=schedule)
    state, step, batch = begin(learner)
    params, masks = parts(state)
    assert set(learner.spec.taps) == set(network().spec.taps)
    assert learner.spec.logits == (4,)
    new = state
    run = jax.jit(step)
    for _ in range(2):
        new, metrics = run(new, batch, ())
    assert jax.tree.structure(new) == jax.tree.structure(state)
    assert np.isfinite(float(metrics["loss"]))
    after, moved = parts(new)
    for path, mask in moved.items():
        assert (np.asarray(after[path])[~np.asarray(mask)] == 0).all()
    changed = any((masks[p] != m).any() for p, m in moved.items())
    assert changed == (updates != "static")
    # Stem, norms and classifier learn too.
    for path in ("stem/kernel", "head/kernel", "block/norm1/scale"):
        assert (after[path] != params[path]).any()
    assert 0.7 < float(metrics["facts"]["flops_share"]) < 1.5


def test_facts_tell_the_cost_with_the_masks_of_now():
    learner = student("wide", updates="static", schedule={"init": "random"})
    variables = learner.init(jax.random.key(0))
    facts = learner.upkeep.facts(variables)
    # Searched until it fits, and masks of exact counts.
    assert float(facts["flops_share"]) == pytest.approx(1, abs=2e-3)
    assert float(facts["density"]) == pytest.approx(
        float(facts["target_density"]), 0.01
    )
    masks = split(variables)[2]["masks"]
    recipe = Recipe(family="wide", sparsity=0.5)
    images = jax.ShapeDtypeStruct((1, *SHAPE), jnp.float32)
    made = transform(Residual(), images, recipe=recipe, train=False)
    for share, flops in ((0, made.structure.flops(dict.fromkeys(masks, 0.0))),
                         (1, made.unmasked_flops)):  # fmt: skip
        other = {p: jnp.full_like(m, bool(share)) for p, m in masks.items()}
        told = learner.upkeep.facts({**variables, "compression": {"masks": other}})
        assert float(told["flops_share"]) == pytest.approx(
            flops.total / made.dense_flops.total, rel=1e-3
        )


MODULES = {
    "vgg": VGG(num_classes=4, stage_sizes=(1, 1, 1), stage_widths=(8, 8, 16)),
    "mobilenet": MobileNetV2(
        num_classes=4, stem_width=8, groups=((6, 8, 1, 1),), last_width=16
    ),
    "vit": VisionTransformer(num_classes=4, width=16, heads=2, depth=4, patch_size=4),
}


@pytest.mark.parametrize("name", MODULES)
def test_networks_of_other_families_have_gradients(name):
    learner = student("doped", of=network(MODULES[name]), updates="static")
    images = jax.random.normal(jax.random.key(1), (4, *SHAPE))

    @jax.jit
    def gradients():
        variables = learner.init(jax.random.key(0))

        def loss(params):
            outputs, _ = learner.apply(
                {**variables, "params": params}, images, train=True, key=None
            )
            return jnp.sum(jnp.square(outputs.logits))

        return jax.grad(loss)(variables["params"]), split(variables)[2]["masks"]

    found, masks = gradients()
    assert len(masks) >= 2
    for path, mask in masks.items():
        # Dense: numbers that take no part have gradients.
        gradient = np.asarray(flatten(found)[path])
        assert np.isfinite(gradient).all(), path
        assert (gradient[~np.asarray(mask)] != 0).any(), path


def test_no_zeros_leave_the_network_as_it_is():
    learner = student("factorized", sparsity=0.0)
    plain = network()
    key = jax.random.key(0)
    one, two = learner.init(key), plain.init(key)
    assert jax.tree.structure(one) == jax.tree.structure(two)
    images = jax.random.normal(key, (2, *SHAPE))
    same = [
        n.apply(v, images, train=False, key=None)[0].logits
        for n, v in ((learner, one), (plain, two))
    ]
    np.testing.assert_array_equal(*same)
    assert learner.upkeep.facts(one) == {}


def test_seeds_are_one_more_axis():
    learner = student("parallel", updates="rigl", schedule={"frequency": 1, "end": 1.0})
    _, step, batch = begin(learner)
    states = [begin(learner, seed=seed)[0] for seed in (0, 1)]
    both = jax.tree.map(lambda *x: jnp.stack(x), *states)
    new, _ = jax.jit(jax.vmap(step, in_axes=(0, None, None)))(both, batch, ())
    for i, state in enumerate(states):
        alone, _ = jax.jit(step)(state, batch, ())
        params, masks = parts(alone)
        mine = jax.tree.map(lambda x, i=i: x[i], parts(new))
        for path, mask in masks.items():
            # A tie of two nearly equal gradients may fall the other way.
            assert (mask != mine[1][path]).sum() <= 4, path
        np.testing.assert_allclose(
            params["head/kernel"], mine[0]["head/kernel"], rtol=1e-3, atol=1e-4
        )


def test_joint_decay_takes_the_place_of_the_decay_of_factors():
    decay = 0.01
    learner = student("doped", updates="static", joint_decay=decay)
    variables = learner.init(jax.random.key(0))
    assert learner.upkeep.weights == {"joint_decay": decay}
    masks = split(variables)[2]["masks"]

    def total(params):
        (term,) = learner.upkeep.terms({**variables, "params": params}).values()
        # What the optimiser adds to the gradient is that of this.
        squares = sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(params))
        return decay * (term + 0.5 * squares)

    gradients = flatten(jax.grad(total)(variables["params"]))
    params = flatten(variables["params"])
    path = "block/conv1"

    def joint(first, second, kernel):
        return 0.5 * decay * jnp.sum(jnp.square(folded(first, second, kernel)))

    names = [f"{path}/{n}kernel" for n in ("U/", "V/", "")]
    expected = jax.grad(joint, argnums=(0, 1, 2))(*(params[n] for n in names))
    for name, value in zip(names, expected, strict=True):
        mask = masks.get(name, jnp.ones((), bool))
        np.testing.assert_allclose(
            jnp.where(mask, gradients[name], 0), jnp.where(mask, value, 0), atol=1e-6
        )
    head = "head/kernel"
    np.testing.assert_allclose(gradients[head], decay * params[head], rtol=1e-5)


def test_restart_and_updates_know_their_network():
    learner = student("factorized", updates="rigl")
    variables = learner.init(jax.random.key(0))
    again = learner.upkeep.restart(jax.random.key(1), variables)
    assert jax.tree.structure(again) == jax.tree.structure(variables)
    made = compression.create("sparse_ift", family="wide", sparsity=0.5)
    params = {"a/kernel": jnp.ones((3, 3))}
    with pytest.raises(ValueError, match="has other parameters than the one"):
        made.init(jax.random.key(0), params)
    after = After(
        params=params, gradients=params, key=jax.random.key(0), step=0,
        steps_per_epoch=1, total_steps=1,
    )  # fmt: skip
    with pytest.raises(ValueError, match="has other parameters than the one"):
        made.update({}, {"masks": {}}, after)


class Foreign(nn.Module):
    """Layers of flax itself, which no rule sees."""

    @nn.compact
    def __call__(self, images, *, train=False):
        x = nn.Conv(4, (3, 3), name="stem")(images)
        x = nn.Dense(5, name="hidden")(x.mean((1, 2)))
        return Outputs(logits=nn.Dense(4, name="head")(x), taps={})


def test_layers_that_no_rule_sees_are_named():
    with pytest.raises(ValueError, match="layer 'hidden' is none of jaxkd's"):
        student("doped", of=from_linen("student", Foreign(), SHAPE))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(family="wide", joint_decay=0.1), "joint_decay is for linear factors"),
        (dict(family="factorized", joint_decay=0.1), "uv_layer='linear'"),
        (dict(family="doped", joint_decay=-1.0), "joint_decay must be >= 0"),
        (dict(family="doped", schedule={"sparsity": 0.1}), "sparsity is an option of"),
        (dict(family="wide", sparsity=0.7), "is not iso-FLOP"),
    ],
)
def test_impossible_options(options, message):
    with pytest.raises(ValueError, match=message):
        compression.create("sparse_ift", **options)


def test_options_of_the_masks_are_checked():
    with pytest.raises(TypeError, match="'rigl' has no option 'frequencies'"):
        compression.create("sparse_ift", family="wide", schedule={"frequencies": 3})
    with pytest.raises(TypeError, match="needs the option 'family'"):
        compression.create("sparse_ift")


def test_the_value_is_a_compression_with_layers():
    made = compression.create("sparse_ift", family="parallel", sparsity=0.5)
    assert made.layers is not None and made.weights == {}
    assert dataclasses.is_dataclass(made)
