"""What is stored of teachers, what a step makes of it, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import distill
from jaxkd.analysis.costs import count_costs
from jaxkd.data import Augmentation
from jaxkd.distill.method import Inputs, Progress
from jaxkd.layers import NetworkSpec, Outputs
from jaxkd.training import ConfigError
from jaxkd.training.sections import TargetsPlan
from jaxkd.training.stored import StoredTeachers, StoredViews, teacher_reads

# Each reads the logits of one teacher, or of as many as there are.
LOGIT_METHODS = {
    "kd": {},
    "kd_cross_entropy": {},
    "dkd": {},
    "nkd": {},
    "dist": {},
    "wsld": {},
    "logit_standardization": {},
    "fkd": {"labels": "teacher", "label_format": "marginal_smoothing_k2"},
    "averaged_teachers": {},
    "ebkd": {},
}


def batch_of(setup, count=16):
    train = setup.train
    records = [train[i] for i in range(count)]
    return {
        "image": jnp.stack([r["image"] for r in records]),
        "label": jnp.stack([r["label"] for r in records]).astype(jnp.int32),
        "index": jnp.arange(count, dtype=jnp.int32),
    }


def variables_of(stage):
    return tuple(
        t.init(jax.random.key(i)) for i, t in enumerate(stage.teachers, start=5)
    )


def ask(stage, variables, images):
    return [
        t.apply(v, images, train=False, key=None)[0]
        for t, v in zip(stage.teachers, variables, strict=True)
    ]


# ----------------------------------------------------------------------- views


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return {
        "image": jnp.asarray(rng.integers(0, 256, (8, 6, 6, 1)), jnp.uint8),
        "label": jnp.zeros(8, jnp.int32),
        "index": jnp.arange(8, dtype=jnp.int32),
    }


def test_views_repeat_the_draws_of_their_epochs(images):
    augmentation = Augmentation(pad_crop=2, flip="both", brightness=0.2)
    views, key = StoredViews(augmentation, 3), jax.random.key(4)

    def see(augments, epoch):
        return augments.train(images, key=key, epoch=epoch, num_classes=4)["image"]

    for epoch in (0, 2, 3, 7):
        expected = see(augmentation, epoch % 3)
        np.testing.assert_array_equal(see(views, jnp.asarray(epoch)), expected)
    assert (see(views, 0) != see(views, 1)).any()


def test_views_of_a_seed_do_not_depend_on_the_run(images):
    views = StoredViews(Augmentation(pad_crop=2), 2, seed=9)
    seen = [
        views.train(images, key=jax.random.key(k), epoch=1, num_classes=4)["image"]
        for k in (0, 1)
    ]
    np.testing.assert_array_equal(*seen)
    expected = Augmentation(pad_crop=2).train(
        images, key=jax.random.key(9), epoch=1, num_classes=4
    )
    np.testing.assert_array_equal(seen[0], expected["image"])


# --------------------------------------------------------------- what is stored


def test_fields_are_named_by_teacher_and_array(stored_setup):
    setup = stored_setup(
        teachers=("teacher", "second"),
        student={"method": {"averaged_teachers": {}}},
        targets={"format": "topk", "top_k": 2, "dtype": "float16", "taps": ("stage1",)},
    )
    (stage,) = setup.stages
    fields = {name: tuple(field) for name, field in stage.stored.fields.items()}
    assert fields == {
        "teacher0/logits/index": ("uint8", (2,)),
        "teacher0/logits/log_probability": ("float16", (2,)),
        "teacher0/logits/log_rest": ("float16", ()),
        "teacher0/taps/stage1/values": ("float16", (4, 4, 8)),
        "teacher1/logits/index": ("uint8", (2,)),
        "teacher1/logits/log_probability": ("float16", (2,)),
        "teacher1/logits/log_rest": ("float16", ()),
        "teacher1/taps/stage1/values": ("float16", (4, 4, 6)),
    }


def test_a_step_finds_what_the_teachers_said(stored_setup):
    setup = stored_setup(
        teachers=("teacher", "second"),
        student={"method": {"averaged_teachers": {}}},
        targets={"taps": ("stage1", "pooled")},
    )
    (stage,) = setup.stages
    outputs = ask(stage, variables_of(stage), jnp.ones((4, 8, 8, 1)) * 0.3)
    packed = stage.stored.encode(stage.stored.answers(outputs))
    batch = {"label": jnp.zeros(4, jnp.int32), **packed}
    found = stage.stored.outputs(batch, stage.stored.constants(outputs))
    assert len(found) == 2
    for live, stored in zip(outputs, found, strict=True):
        np.testing.assert_array_equal(stored.logits, live.logits)
        assert stored.taps.keys() == {"stage1", "pooled"}
        for name, tap in stored.taps.items():
            np.testing.assert_allclose(tap, live.taps[name], rtol=2**-11, atol=2**-25)
        assert stored.head is None and stored.norms == {}


@pytest.mark.parametrize("format", ["full", "uint8", "topk"])
def test_dense_logits_are_stored_by_pixel(format):
    plan = TargetsPlan(format=format, top_k=1 if format == "topk" else None)
    spec = NetworkSpec(name="teacher", logits=(5, 6, 2), taps={})
    stored = StoredTeachers(
        plan=plan,
        teachers=(spec,),
        with_head=(False,),
        norms=((),),
        input_shape=(5, 6, 1),
    )
    logits = jax.random.normal(jax.random.key(0), (3, 5, 6, 2))
    packed = stored.encode(stored.answers([Outputs(logits=logits, taps={})]))
    (found,) = stored.outputs(packed, ({"head": None, "norms": {}},))
    # Of two classes, the largest and the rest are all there is.
    atol = {"full": 0, "topk": 1e-6, "uint8": 0.02}[format]
    np.testing.assert_allclose(
        jax.nn.log_softmax(found.logits), jax.nn.log_softmax(logits), atol=atol
    )


# ------------------------------------------------------- what the method reads


def reads_of(setup):
    (stage,) = setup.stages
    return teacher_reads(
        stage.method,
        student=stage.student,
        teachers=stage.teachers,
        data=stage.data,
        input_shape=(8, 8, 1),
    )


def test_what_a_method_reads_is_found_without_running_it(stored_setup):
    def reads(method, teachers=("teacher",)):
        return reads_of(stored_setup(student={"method": method}, teachers=teachers))

    assert reads({"ce": {}, "kd": {}}) == (frozenset({"logits"}),)
    assert reads({"fitnet": {"student_tap": "stage1", "teacher_tap": "stage1"}}) == (
        {"taps/stage1"},
    )
    assert reads({"srrl": {}}) == (
        {"logits", "taps/pooled", "head/kernel", "head/bias"},
    )
    options = {"hint_weights": "projected"}
    both = reads({"camkd": options}, teachers=("teacher", "second"))
    expected = {"logits", "taps/stage1", "head/kernel", "head/bias"}
    assert both == (expected, expected)


def test_layers_that_a_method_reads_are_kept_once(stored_setup):
    setup = stored_setup(
        student={"method": {"srrl": {}}}, targets={"taps": ("pooled",)}
    )
    (stage,) = setup.stages
    variables = variables_of(stage)
    outputs = ask(stage, variables, jnp.ones((2, 8, 8, 1)))
    (fixed,) = stage.stored.constants(outputs)
    assert fixed["norms"] == {} and fixed["head"].keys() == {"kernel", "bias"}
    kernel = variables[0]["params"]["head"]["kernel"]
    np.testing.assert_array_equal(fixed["head"]["kernel"], kernel)
    assert not any("head" in name for name in stage.stored.fields)


# ---------------------------------------------------------------- live = stored


def terms_of(stage, outputs, batch):
    """What the stage's method says of a student that guesses."""
    spec = stage.student.spec
    key = jax.random.key(0)
    student = Outputs(
        logits=jax.random.normal(key, (16, *spec.logits)),
        taps={k: jax.random.normal(key, (16, *s)) for k, s in spec.taps.items()},
    )
    specs = distill.Specs(
        student=spec, teachers=tuple(t.spec for t in stage.teachers), data=stage.data
    )
    params, memory = stage.method.init(key, specs)
    step = jnp.zeros((), jnp.int32)
    inputs = Inputs(
        student=student,
        teachers=tuple(outputs),
        batch=batch,
        key=key,
        progress=Progress(step=step, epoch=step, epochs=2),
    )
    return stage.method.terms(params, memory, inputs)[0]


@pytest.mark.parametrize("method", LOGIT_METHODS)
def test_every_logit_method_reads_stored_answers_as_live_ones(stored_setup, method):
    many = method in ("averaged_teachers", "ebkd")
    setup = stored_setup(
        targets={},
        student={"method": {method: LOGIT_METHODS[method]}},
        teachers=("teacher", "second") if many else ("teacher",),
    )
    (stage,) = setup.stages
    batch = batch_of(setup)
    images = setup.augmentation.evaluate(batch)["image"]
    live = ask(stage, variables_of(stage), images)
    packed = stage.stored.encode(stage.stored.answers(live))
    found = stage.stored.outputs(packed, stage.stored.constants(live))
    a, b = terms_of(stage, live, batch), terms_of(stage, found, {**batch, **packed})
    assert a.keys() == b.keys()
    for name, value in a.items():
        np.testing.assert_array_equal(b[name], value)


def test_the_teacher_does_not_run_in_the_step(stored_setup):
    """Multiply-accumulates: live - stored is the teachers' forward pass, exactly."""

    def macs(setup):
        (stage,) = setup.stages
        state = jax.eval_shape(stage.init_state, jax.random.key(0))
        batch = batch_of(setup)
        if stage.stored is None:
            teachers = variables_of(stage)
        else:
            teachers = ({"head": None, "norms": {}},)
            batch |= {
                name: np.zeros((16, *field.shape), field.dtype)
                for name, field in stage.stored.fields.items()
            }
        step = stage.train_step(setup.augmentation)
        return count_costs(step, state, batch, teachers).macs, stage

    live, stage = macs(stored_setup(targets=None))
    stored, _ = macs(stored_setup(targets={}))
    (teacher,), (variables,) = stage.teachers, variables_of(stage)
    forward = count_costs(
        lambda v, x: teacher.apply(v, x, train=False, key=None)[0].logits,
        variables,
        jnp.zeros((16, 8, 8, 1)),
    ).macs
    assert live - stored == forward > 0.2 * live


def test_micro_batches_get_their_own_answers(stored_setup):
    """Accumulation splits the stored arrays as it splits the images."""
    changes = {"method": {"kd": {}}, "optimizer": {"learning_rate": 0.1}}
    results = []
    for accumulate in (1, 2):
        setup = stored_setup(
            targets={},
            student={**changes, "accumulate": accumulate},
            data={"augment": {}},
        )
        (stage,) = setup.stages
        batch = batch_of(setup)
        images = setup.augmentation.evaluate(batch)["image"]
        answers = stage.stored.answers(ask(stage, variables_of(stage), images))
        batch |= stage.stored.encode(answers)
        step = jax.jit(stage.train_step(setup.augmentation))
        state = stage.init_state(jax.random.key(0))
        # Of 16 records, micro-batches of records 0, 2, ... and 1, 3, ... .
        _, metrics = step(state, batch, ({"head": None, "norms": {}},))
        results.append(float(metrics["terms"]["kd"]))
    # Batch norm sees other batches; wrong answers would be another loss altogether.
    assert results[1] == pytest.approx(results[0], rel=0.1)


# -------------------------------------------------------------------- refusals


REFUSED = {
    "mixup": ({"data": {"augment": {"mixup": 0.2}}}, "mixup and .cutmix mix whole"),
    "cutmix": ({"data": {"augment": {"cutmix": 1.0}}}, "mix whole batches"),
    "strong": ({"data": {"augment": {"strong": {}}}}, "augment.strong shows"),
    "unlabelled": (
        {"data": {"labelled_fraction": 0.5, "unlabelled_batch_size": 16}},
        "unlabelled images are not labelled",
    ),
    "training mode": (
        {"student": {"method": {"meal": {}}}},
        "training mode",
    ),
    "no teacher": (
        {"student": {"method": {"ce": {}}, "teachers": ()}},
        "teachers names none",
    ),
    "unknown tap": ({"targets": {"taps": ("stage9",)}}, r"taps: no teacher.*'stage9'"),
    "tap that is not stored": (
        {"student": {"method": {"srrl": {}}}, "targets": {"taps": ("stage1",)}},
        r"targets.taps: the method reads pooled .* stage1 stored",
    ),
    "taps that lead astray": (
        {
            "student": {"method": {"own": {"name": "network_of_stored:second_tap"}}},
            "targets": {"taps": ("stage1", "stage1_pre")},
        },
        "taps: with stage1, stage1_pre alone the method would read other taps",
    ),
    "too many classes": (
        {"targets": {"format": "topk", "top_k": 4}},
        "top_k must be from 1 to 3 for 4 classes, got 4",
    ),
    "regions of two": (
        {
            "teachers": ("teacher", "second"),
            "student": {"method": {"averaged_teachers": {}}},
            "targets": {"regions": 4},
        },
        "regions: one teacher",
    ),
    "label format": (
        {"targets": {"regions": 4, "label_format": "marginal_smoothing_k9"}},
        "label_format: .*at least 10 classes",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_stored_is_refused_in_one_line(stored_setup, name):
    changes, text = REFUSED[name]
    with pytest.raises(ConfigError, match=text) as error:
        stored_setup(**{"targets": {}, **changes})
    assert str(error.value).startswith("config.stages.student.targets")
    assert "\n" not in str(error.value)


def test_methods_with_views_of_their_own_are_refused(stored_setup):
    with pytest.raises(ConfigError, match="further views"):
        stored_setup(
            targets={},
            student={"method": {"own": {"name": "network_of_stored:mirrored"}}},
        )
