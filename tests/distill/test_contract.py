"""What every method promises. A new method is one row in a file of contracts/.

A row is `(name, options, kind)`. The kind says what a method is tried on:
"classification" (also "memory", "views"), "equal" (networks with maps of equal
shapes), "tokens" (transformers), "segmentation", "peers" (two students) or "teachers"
(two of them). The option `name` is the registered name, where a row has another.
"""

import dataclasses
import runpy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxkd import distill
from jaxkd.layers import NetworkSpec, Outputs

BATCH, CLASSES = 8, 5
# Networks of one stage each differ in width, and the teacher's last maps in size.
STUDENT_MAPS = {"stem": (8, 3), "stage1": (8, 3), "stage2": (4, 4), "stage3": (2, 6)}
TEACHER_MAPS = {"stem": (8, 4), "stage1": (8, 4), "stage2": (4, 5), "stage3": (2, 8)}
STUDENT_LEVELS = {"e1": (8, 3), "e2": (4, 3), "e3": (4, 4), "e4": (2, 5), "e5": (2, 6)}
TEACHER_LEVELS = {"e1": (8, 4), "e2": (4, 5), "e3": (4, 4), "e4": (4, 6), "e5": (2, 7)}
DECODER = {"d5": (8, 5), "d4": (8, 4), "d3": (8, 3), "d2": (8, 3)}


@dataclasses.dataclass(frozen=True)
class Row:
    name: str
    options: Mapping[str, Any]
    kind: str

    def method(self):
        options = dict(self.options)
        return distill.create(options.pop("name", self.name), **options)


def load_rows():
    rows = []
    for path in sorted((Path(__file__).parent / "contracts").glob("*.py")):
        rows += [Row(*row) for row in runpy.run_path(str(path))["METHODS"]]
    return rows


ROWS = load_rows()


def normal(rng, *shape):
    return jnp.asarray(rng.standard_normal((BATCH, *shape)), jnp.float32)


def classifier(rng, maps):
    taps = {}
    for tap, (size, channels) in maps.items():
        before = normal(rng, size, size, channels)
        if tap != "stem":
            taps[f"{tap}_pre"] = before
        taps[tap] = jax.nn.relu(before)
    taps["pooled"] = taps["stage3"].mean((1, 2))
    taps["cls_logits"], taps["dist_logits"] = normal(rng, CLASSES), normal(rng, CLASSES)
    width = taps["pooled"].shape[-1]
    kernel = jnp.asarray(rng.standard_normal((width, CLASSES)), jnp.float32)
    head = {"kernel": kernel, "bias": jnp.arange(CLASSES, dtype=jnp.float32)}
    norms = {
        f"{tap}_pre": {"scale": jnp.ones(channels), "bias": jnp.full(channels, 0.5)}
        for tap, (_, channels) in maps.items()
        if tap != "stem"
    }
    logits = taps["pooled"] @ kernel + head["bias"][None]
    return Outputs(logits=logits, taps=taps, head=head, norms=norms)


def with_tokens(rng, outputs, width):
    """A class token and a grid of 4x4."""
    names = ("block1", "block2", "tokens")
    return outputs.replace(
        taps=outputs.taps | {name: normal(rng, 17, width) for name in names}
    )


def segmenter(rng, levels):
    taps = {
        tap: normal(rng, size, size, c) for tap, (size, c) in (levels | DECODER).items()
    }
    logits = normal(rng, 8, 8, 3)
    return Outputs(logits=logits, taps={**taps, "out": logits})


def make_inputs(kind, method):
    rng = np.random.default_rng(0)
    index = jnp.arange(BATCH, dtype=jnp.int32)
    if kind == "segmentation":
        student = segmenter(rng, STUDENT_LEVELS)
        teachers = (segmenter(rng, TEACHER_LEVELS), segmenter(rng, TEACHER_LEVELS))
        label = jnp.asarray(rng.integers(0, 3, (BATCH, 8, 8)), jnp.int32)
    else:
        widths = {"tokens": (6, 8)}.get(kind)
        student = classifier(rng, STUDENT_MAPS)
        maps = STUDENT_MAPS if kind == "equal" else TEACHER_MAPS
        teachers = (classifier(rng, maps), classifier(rng, maps))
        if widths is not None:
            student = with_tokens(rng, student, widths[0])
            teachers = tuple(with_tokens(rng, t, widths[1]) for t in teachers)
        label = jnp.asarray(rng.integers(0, CLASSES, BATCH), jnp.int32)
    count = {"teachers": 2}.get(kind, method.num_teachers)
    teachers = teachers[: 1 if count == "many" else count]
    batch = {"image": normal(rng, 8, 8, 1), "label": label, "index": index}
    if method.prepare is not None:
        batch["unlabelled_image"] = jnp.concatenate([batch["image"], -batch["image"]])
        batch = method.prepare(batch, jax.random.key(3))
    if method.views:

        def with_views(outputs):
            views = {
                view: jax.tree.map(lambda x, i=i: x * (1.1 + 0.1 * i), outputs)
                for i, view in enumerate(method.views)
            }
            return outputs.replace(views=views)

        student, teachers = with_views(student), tuple(map(with_views, teachers))
    if kind == "peers":
        peer = jax.tree.map(lambda x: 0.9 * x + 0.1, student)
        student = student.replace(peers=(peer,))
    return distill.Inputs(
        student=student,
        teachers=teachers,
        batch=batch,
        key=jax.random.key(2),
        progress=distill.Progress(
            step=jnp.asarray(7, jnp.int32), epoch=jnp.asarray(3), epochs=10
        ),
    )


def specs_of(inputs):
    labels = np.arange(BATCH) % CLASSES
    return distill.Specs(
        student=NetworkSpec.from_outputs("small", inputs.student),
        teachers=tuple(NetworkSpec.from_outputs("large", t) for t in inputs.teachers),
        data=distill.DataSpec(
            records=BATCH,
            num_classes=inputs.student.logits.shape[-1],
            batch_size=BATCH,
            steps_per_epoch=2,
            epochs=10,
            read_labels=lambda: labels,
        ),
    )


def make_run(method):
    """Jitted: everything that one step asks of a method."""

    def run(params, memory, inputs):
        def loss(params, student, teachers):
            given = inputs.replace(student=student, teachers=teachers)
            terms, new_memory = method.terms(params, memory, given)
            total = sum(
                distill.weight_at(method.weights[name], inputs.progress.step)
                * jnp.mean(value)
                for name, value in terms.items()
            )
            return total, (terms, new_memory)

        gradient = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)
        return gradient(params, inputs.student, inputs.teachers)

    return jax.jit(run)


def finite(tree):
    floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return all(bool(jnp.all(jnp.isfinite(x))) for x in floats)


def shapes(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_one_step_keeps_every_promise(row):
    method = row.method()
    inputs = make_inputs(row.kind, method)
    specs = specs_of(inputs)

    # The state is made of arrays, whose shapes are known before any of them exists.
    def init(key):
        return method.init(key, specs)

    params, memory = jax.jit(init)(jax.random.key(1))
    assert shapes(jax.eval_shape(init, jax.random.key(1))) == shapes((params, memory))

    run = make_run(method)
    (total, (terms, new_memory)), grads = run(params, memory, inputs)
    assert terms.keys() == method.weights.keys()
    for name, value in terms.items():
        assert value.dtype == jnp.float32, name
        assert value.shape[0] == BATCH or value.shape[0] == 2 * BATCH, name
    assert finite((total, terms, new_memory, grads))
    assert shapes(new_memory) == shapes(memory)
    # Something learns, and no teacher does.
    assert any(bool(jnp.any(x != 0)) for x in jax.tree.leaves(grads[:2]))
    assert not any(bool(jnp.any(x != 0)) for x in jax.tree.leaves(grads[2]))

    # Eight devices, each with one record, give the same as one device.
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def place(x):
        split = x.ndim > 0 and x.shape[0] % BATCH == 0 and x.shape[0] > 0
        return jax.device_put(
            x, NamedSharding(mesh, PartitionSpec("data" if split else None))
        )

    def place_outputs(outputs):
        heads = (outputs.head, outputs.norms)
        placed = jax.tree.map(place, outputs.replace(head=None, norms={}))
        everywhere = NamedSharding(mesh, PartitionSpec())
        head, norms = jax.device_put(heads, everywhere)
        return placed.replace(head=head, norms=norms)

    sharded = inputs.replace(
        student=place_outputs(inputs.student),
        teachers=tuple(map(place_outputs, inputs.teachers)),
        batch=jax.tree.map(place, inputs.batch),
    )
    (other_total, _), other_grads = run(params, memory, sharded)
    np.testing.assert_allclose(other_total, total, rtol=2e-4)
    for a, b in zip(
        jax.tree.leaves(other_grads[:2]), jax.tree.leaves(grads[:2]), strict=True
    ):
        scale = float(jnp.max(jnp.abs(b))) if b.size else 0.0
        np.testing.assert_allclose(a, b, rtol=5e-3, atol=1e-5 + 5e-4 * scale)


def test_every_method_has_a_row():
    """All that are registered, but those of the task and of HLFD's family."""
    tried = {dict(row.options).get("name", row.name) for row in ROWS}
    older = {"ce", "focal", "dice", "bce_dice", "focal_dice", "emkd"}
    older |= {"hlfd", "hifd", "ifd"}
    older |= {name for name in distill.names() if name.startswith("seg_")}
    missing = set(distill.names()) - tried - older
    assert not missing, f"no row in tests/distill/contracts for {sorted(missing)}"
