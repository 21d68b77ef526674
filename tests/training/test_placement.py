"""Where networks live, what that makes devices send, and that no number changes."""

import copy
import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxkd import models
from jaxkd.analysis import read_collectives, sum_up
from jaxkd.data import Augmentation
from jaxkd.distill import weighted
from jaxkd.layers import BatchNorm, Outputs, Partition
from jaxkd.models.vit import TransformerBlock
from jaxkd.training import (
    ConfigError,
    Plan,
    from_linen,
    make_setup,
    placement,
    sharding,
)
from jaxkd.training.checkpoints import abstract_like

# ------------------------------------------------------------------------- teachers


def _teacher(size=64):
    return {"params": {"kernel": jnp.zeros((size, size)), "bias": jnp.zeros(size)}}


def _specs(mesh, mode, partition=None):
    (found,) = placement.teacher_sharding(
        [_teacher()], mesh, mode=mode, min_size=65, partitions=[partition]
    )
    return found["params"]["kernel"].spec, found["params"]["bias"].spec


def test_teachers_are_whole_or_split_as_the_config_says():
    mesh = sharding.make_mesh(fsdp=4)
    assert _specs(mesh, "replicated") == (P(), P())
    assert _specs(mesh, "sharded") == (P("fsdp", None), P())
    # Without fsdp, the devices along data hold parts of them.
    assert _specs(sharding.make_mesh(), "sharded") == (P("data", None), P())


def test_auto_keeps_teachers_whole_up_to_a_quarter_of_the_memory(monkeypatch):
    mesh = sharding.make_mesh(fsdp=8)
    size = 4 * (64 * 64 + 64)
    for memory, spec in ((4 * size, P()), (4 * size - 1, P("fsdp", None))):
        monkeypatch.setattr(placement, "device_memory", lambda mesh, m=memory: m)
        assert _specs(mesh, "auto")[0] == spec


def test_what_a_teacher_declares_is_split_over_model_in_any_case():
    partition = Partition(rules={"kernel": (None, "model")}, units={})
    mesh = sharding.make_mesh(model=2, fsdp=2)
    assert _specs(mesh, "replicated", partition)[0] == P(None, "model")
    assert _specs(mesh, "sharded", partition)[0] == P("fsdp", "model")


def test_all_teachers_together_must_fit(monkeypatch):
    mesh = sharding.make_mesh(fsdp=8)
    monkeypatch.setattr(placement, "device_memory", lambda mesh: 5 * 4 * (64 * 64 + 64))
    one, two = (
        placement.teacher_sharding(
            [_teacher()] * n, mesh, mode="auto", min_size=8, partitions=[None] * n
        )
        for n in (1, 2)
    )
    assert one[0]["params"]["kernel"].is_fully_replicated
    assert not any(t["params"]["kernel"].is_fully_replicated for t in two)


def test_the_teachers_of_all_seeds_must_fit(monkeypatch):
    """A config with seeds counts each of its teachers once for every seed."""
    size = 4 * (64 * 64 + 64)
    mesh = sharding.make_mesh(fsdp=8)
    monkeypatch.setattr(placement, "device_memory", lambda mesh: 3 * 4 * size)
    for copies, fits in ((3, True), (4, False)):
        (found,) = placement.teacher_sharding(
            [_teacher()], mesh, mode="auto", min_size=8, partitions=[None],
            copies=copies,
        )  # fmt: skip
        assert found["params"]["kernel"].is_fully_replicated is fits


def test_without_teachers_no_memory_is_asked_for(monkeypatch):
    monkeypatch.setattr(placement, "device_memory", None)
    mesh = sharding.make_mesh(fsdp=8)
    options = {"mode": "auto", "min_size": 8, "partitions": []}
    assert placement.teacher_sharding([], mesh, **options) == ()


def test_bytes_are_counted_as_they_are_split():
    mesh = sharding.make_mesh(fsdp=4)
    tree = _teacher()
    split = sharding.state_sharding(tree, mesh, min_size=65)
    assert placement.bytes_per_device(tree, split) == 4 * (64 * 16 + 64)


# --------------------------------------------------------------------- what is sent


class Normed(nn.Module):
    """Two kernels, of 36 and 12 numbers, and a batch norm over 4 channels."""

    @nn.compact
    def __call__(self, images, *, train=False):
        x = nn.Conv(4, (3, 3), use_bias=False)(images)
        x = nn.relu(BatchNorm()(x, train))
        return Outputs(logits=nn.Dense(3, use_bias=False)(x.mean((1, 2))), taps={})


KERNELS = 4 * (36 + 12)
# Scale and bias; mean and variance of the batch (what the backward pass sums is the
# gradient of scale and bias); the means of two terms.
SMALL_SUMS = [16, 16, 16, 16, 4, 4]


@pytest.fixture
def sent(make_kit, batch):
    """Compiles a step of distillation and reads what it sends."""

    def compiled(mesh, *, teacher="replicated", **options):
        kit = make_kit(weighted({"ce": 0.5, "kd": 0.5}), **options)
        kit.student, *kit.teachers = (
            from_linen(name, Normed(), (8, 8, 1)) for name in ("student", "teacher")
        )
        shapes, variables = jax.eval_shape(
            lambda: (kit.state(), kit.teacher_variables())
        )
        stored = sharding.state_sharding(shapes, mesh, min_size=12)
        placed = placement.teacher_sharding(
            variables, mesh, mode=teacher, min_size=12, partitions=[None]
        )
        step = kit.make_step(
            placement.gathering(kit.student, stored.params["network"]),
            [placement.gathering(kit.teachers[0], placed[0]["params"])],
        )
        arguments = (
            abstract_like(shapes, stored),
            sharding.put_batch(batch, mesh),
            abstract_like(variables, placed),
        )
        options = {"out_shardings": (stored, sharding.replicated(mesh))}
        return read_collectives(jax.jit(step, **options).lower(*arguments).compile())

    return compiled


def _by_devices(collectives):
    """Arrays and bytes by kind and number of devices that exchange."""
    found = {}
    for one in collectives:
        arrays, size = found.get((one.kind, one.devices), (0, 0))
        found[one.kind, one.devices] = (arrays + one.arrays, size + one.bytes)
    return found


def test_data_parallel_steps_sum_gradients_statistics_and_means(sent):
    found = sent(sharding.make_mesh())
    total = sum(SMALL_SUMS) + KERNELS
    assert _by_devices(found) == {("all-reduce", 8): (len(SMALL_SUMS) + 2, total)}
    traffic = sum_up(found)["all-reduce"]
    assert traffic.bytes == total and traffic.sent_bytes == 2 * 7 / 8 * total


def test_augmentation_sends_nothing(sent):
    augmentation = Augmentation(
        flip="both", rot90=True, pad_crop=1, brightness=0.5, contrast=0.5
    )
    plain = sent(sharding.make_mesh())
    changed = sent(sharding.make_mesh(), augmentation=augmentation)
    assert _by_devices(changed) == _by_devices(plain)


def test_fsdp_gathers_every_split_parameter_once(sent):
    found = _by_devices(sent(sharding.make_mesh(data=2, fsdp=4)))
    assert found.pop(("all-gather", 4)) == (2, KERNELS)
    # Their gradients are summed over fsdp, and then each part over data.
    assert found.pop(("all-reduce", 2)) == (2, KERNELS // 4)
    # The parts of two norms of two kernels: of the gradient and of the update.
    norms = 4 * 2 * 2
    assert found.pop(("all-reduce", 4)) == (2 + 4, KERNELS + norms)
    assert found == {("all-reduce", 8): (len(SMALL_SUMS), sum(SMALL_SUMS))}


def test_micro_batches_gather_once_and_sum_each_time(sent):
    traffic = sum_up(sent(sharding.make_mesh(data=2, fsdp=4), accumulate=2))
    assert traffic.keys() == {"all-gather", "all-reduce"}
    assert traffic["all-gather"].bytes == KERNELS
    each_time = sum(SMALL_SUMS) + KERNELS + KERNELS // 4
    assert traffic["all-reduce"].bytes == 2 * each_time + 4 * 2 * 2


def test_arrays_that_fsdp_does_not_divide_cost_no_gather(sent):
    plain, fsdp = sent(sharding.make_mesh()), sent(sharding.make_mesh(fsdp=8))
    assert _by_devices(fsdp) == _by_devices(plain)


@pytest.mark.parametrize("mesh", [{"fsdp": 4}, {"fsdp": 1}])
def test_a_split_teacher_is_gathered_and_nothing_else_changes(sent, mesh):
    mesh = sharding.make_mesh(**mesh, devices=jax.devices()[:4])
    whole = _by_devices(sent(mesh))
    split = _by_devices(sent(mesh, teacher="sharded"))
    arrays, size = whole.get(("all-gather", 4), (0, 0))
    assert split.pop(("all-gather", 4)) == (arrays + 2, size + KERNELS)
    whole.pop(("all-gather", 4), None)
    assert split == whole


# ------------------------------------------------------------------ transformers

WIDTH, TOKENS = 24, 4
PARTITION = models.create("deit_small", num_classes=10).partition()


class OneBlock(nn.Module):
    """The least of a vision transformer."""

    @nn.compact
    def __call__(self, images, *, train=False):
        x = nn.Conv(WIDTH, (4, 4), strides=4, name="patches")(images)
        x = x.reshape(len(images), TOKENS, WIDTH)
        x = TransformerBlock(6, name="block1")(x, train)
        taps = {"stage2": x.reshape(-1, 2, 2, WIDTH)}
        return Outputs(logits=nn.Dense(10, name="head")(x.mean(1)), taps=taps)

    def partition(self):
        return PARTITION


def one_block(*, num_classes):
    return OneBlock()


CONFIG = {
    "run": ("student",),
    "networks": {
        "teacher": {"name": f"{__name__}:one_block", "frozen": True},
        "student": {"name": f"{__name__}:one_block"},
    },
    "data": {"source": "digits", "batch_size": 32},
    "stages": {
        "student": {
            "teachers": ("teacher",),
            "epochs": 1,
            "ema": 0.9,
            "optimizer": {"name": "sgd", "learning_rate": 0.01},
        }
    },
}
SHARDED = {"fsdp": 2, "model": 2, "fsdp_min_size": 8}


def _setup(mesh, *, method=None, **networks):
    config = copy.deepcopy({**CONFIG, "mesh": mesh})
    config["networks"] |= networks
    config["stages"]["student"]["method"] = method or {
        "ce": {},
        "fitnet": {"weight": 0.01},
    }
    return make_setup(Plan.from_config(config))


class _Run:
    """The stage of a setup: its state, its teachers and its step."""

    def __init__(self, setup, mesh=None):
        setup = dataclasses.replace(setup, mesh=mesh or setup.mesh)
        (stage,) = setup.stages
        self.shardings = placement.learner_sharding(setup, stage)
        self.state = jax.jit(
            lambda key: stage.begin(key, {}), out_shardings=self.shardings
        )(jax.random.key(0))
        teacher = jax.jit(setup.networks["teacher"].init)(jax.random.key(5))
        placed, self.teachers = placement.place(setup, stage, {"teacher": teacher})
        self.step = jax.jit(
            placed.train_step(setup.augmentation),
            out_shardings=(self.shardings, sharding.replicated(setup.mesh)),
        )
        rng = np.random.default_rng(0)
        batch = {
            "image": rng.integers(0, 17, (32, 8, 8, 1), np.uint8),
            "label": rng.integers(0, 10, 32, np.int32),
            "index": np.arange(32, dtype=np.int32),
        }
        self.batch = sharding.put_batch(batch, setup.mesh)

    def two_steps(self):
        state, first = self.step(self.state, self.batch, self.teachers)
        state, second = self.step(state, self.batch, self.teachers)
        return state, jax.device_get((state.params, state.average, first, second))


@pytest.fixture(scope="module")
def sharded():
    run = _Run(_setup(SHARDED))
    return run, *run.two_steps()


@pytest.fixture(scope="module")
def one_device():
    return _Run(_setup({}), sharding.make_mesh(devices=jax.devices()[:1])).two_steps()[
        1
    ]


def _close(a, b):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), a, b
    )


def test_three_axes_give_the_numbers_of_one_device(sharded, one_device):
    _close(sharded[2], one_device)


@pytest.mark.parametrize(
    "mesh",
    [
        {"fsdp": 8, "fsdp_min_size": 8, "teacher": "sharded"},
        {"model": 2, "teacher": "sharded", "fsdp_min_size": 8},
    ],
)
def test_split_teachers_give_the_numbers_of_one_device(mesh, one_device):
    _close(_Run(_setup(mesh)).two_steps()[1], one_device)


def test_what_belongs_to_a_parameter_lives_where_it_lives(sharded):
    run, state, _ = sharded
    (trace,) = (s for s in state.opt_state if hasattr(s, "trace"))
    trees = [
        state.params["network"],
        trace.trace["network"],
        state.average["params"],
    ]
    for name, spec in {
        "attention/qkv/kernel": P("fsdp", "model"),
        "attention/project/kernel": P("model", "fsdp"),
        "hidden/bias": P("model"),
        "output/kernel": P("model", "fsdp"),
        "norm1/scale": P("fsdp"),
    }.items():
        for leaf in (tree["block1"] for tree in trees):
            for key in name.split("/"):
                leaf = leaf[key]
            assert leaf.sharding.spec == spec, name
    kernel = run.teachers[0]["params"]["block1"]["hidden"]["kernel"]
    assert kernel.sharding.spec == P(None, "model")


def test_layers_split_over_model_send_tokens_twice_each_way():
    mesh = sharding.make_mesh(data=1, model=2, devices=jax.devices()[:2])
    run = _Run(_setup({}), mesh)
    found = read_collectives(
        run.step.lower(run.state, run.batch, run.teachers).compile()
    )
    # After the attention and after the hidden layer, of student and teacher; and before
    # both of them on the student's way back. Beside them, parts of two norms (of the
    # gradient and the update) of six parameters that are split.
    tokens = 4 * 32 * TOKENS * WIDTH
    assert _by_devices(found) == {
        ("all-reduce", 2): (6 + 2 * 6, 6 * tokens + 4 * 2 * 6)
    }


@pytest.mark.parametrize(
    ("network", "model", "message"),
    [
        (
            "resnet8",
            2,
            "config.mesh.model: 2, but network 'student' (resnet8) does not",
        ),
        ("deit_tiny", 2, "config.mesh.model: network 'student': 3 heads do not split"),
        ("deit_tiny", 3, "config.mesh: data 2 x fsdp 1 x model 3 = 6 devices wanted"),
    ],
)
def test_networks_that_cannot_be_split_over_model_are_refused(network, model, message):
    options = {"patch_size": 4} if network == "deit_tiny" else {}
    with pytest.raises(ConfigError) as error:
        _setup({"model": model}, student={"name": network, **options})
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_frozen_teacher_without_rules_is_whole_on_every_device():
    frozen = {"name": "resnet8", "frozen": True}
    setup = _setup({"model": 2}, method={"kd": {}}, teacher=frozen)
    (stage,) = setup.stages
    teacher = jax.eval_shape(setup.networks["teacher"].init, jax.random.key(0))
    (found,) = placement.teacher_sharding(
        [teacher], setup.mesh, mode="auto", min_size=8,
        partitions=[stage.teachers[0].partition],
    )  # fmt: skip
    assert all(s.is_fully_replicated for s in jax.tree.leaves(found))


@pytest.mark.parametrize(("seeds", "fits"), [((), True), ((1, 2), False)])
def test_the_seeds_of_a_run_are_counted(monkeypatch, seeds, fits):
    setup = _setup({"fsdp": 8, "fsdp_min_size": 8}, method={"ce": {}, "kd": {}})
    plan = dataclasses.replace(setup.plan, seeds=seeds)
    setup = dataclasses.replace(setup, plan=plan)
    (stage,) = setup.stages
    shapes = [jax.eval_shape(setup.networks["teacher"].init, jax.random.key(0))]
    size = sum(4 * x.size for x in jax.tree.leaves(shapes))
    monkeypatch.setattr(placement, "device_memory", lambda mesh: 4 * size)
    (found,) = placement.live_sharding(setup, stage, shapes)
    kernel = found["params"]["block1"]["hidden"]["kernel"]
    assert kernel.is_fully_replicated is fits


def test_without_split_arrays_the_networks_are_used_as_they_are():
    setup = _setup({})
    (stage,) = setup.stages
    teacher = jax.jit(setup.networks["teacher"].init)(jax.random.key(5))
    placed, _ = placement.place(setup, stage, {"teacher": teacher})
    assert placed.student is stage.student and placed.method is stage.method
    assert placed.teachers == stage.teachers
