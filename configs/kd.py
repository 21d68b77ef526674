"""Hinton knowledge distillation on digits or CIFAR-100.

Commands:
    python -m jaxkd.main --config=configs/kd.py --workdir=runs/kd
    python -m jaxkd.main --config=configs/kd.py:smoke --workdir=runs/kd-smoke
    python -m jaxkd.main --config=configs/kd.py:resnet32x4-resnet8x4 \
        --config.data.path=data/cifar-100-python --workdir=runs/kd-cifar

Variants:
    digits   scikit-learn's 8x8 digits, the default.
    smoke    the same for a few seconds.
    TEACHER-STUDENT   two networks of the CIFAR family on CIFAR-100 with the usual
        240-epoch recipe (`config.data.path` names the folder of the python pickles).

Expected: see docs/methods/kd.md.
"""

from ml_collections import ConfigDict, config_dict


def get_config(arg: str = "") -> ConfigDict:
    variant = arg or "digits"
    if variant in ("digits", "smoke"):
        return _digits(smoke=variant == "smoke")
    teacher, dash, student = variant.partition("-")
    if not dash or not teacher or not student:
        raise ValueError(
            f"configs/kd.py has no variant {arg!r}; take digits, smoke or "
            "TEACHER-STUDENT, e.g. resnet32x4-resnet8x4"
        )
    return _cifar100(teacher, student)


def _stages(config: ConfigDict, optimizer: dict, epochs: int, ce: float, kd: float):
    common = dict(epochs=epochs, optimizer=optimizer)
    config.stages = ConfigDict(
        dict(
            teacher=dict(method=dict(ce=dict(weight=1.0)), **common),
            student_alone=dict(method=dict(ce=dict(weight=1.0)), **common),
            student=dict(
                teachers=("teacher",),
                method=dict(ce=dict(weight=ce), kd=dict(weight=kd, temperature=4.0)),
                **common,
            ),
        )
    )


def _digits(*, smoke: bool) -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.run = ("teacher", "student_alone", "student")
    config.precision = "float32"
    config.notes = ("Handwritten digits of 8x8 pixels: a toy set, for trying things.",)
    student = dict(name="resnet8", width_factor=0.5)
    config.networks = dict(
        teacher=dict(name="resnet14", width_factor=1.0),
        student_alone=dict(student),
        student=dict(student),
    )
    config.data = dict(source="digits", path=config_dict.placeholder(str))
    config.data.update(batch_size=64, workers=0, on_error="raise")
    config.data.augment = dict(pad_crop=1)
    optimizer = dict(name="sgd", learning_rate=0.1, schedule="cosine")
    optimizer.update(momentum=0.9, weight_decay=5e-4, warmup_epochs=0.5)
    _stages(config, optimizer, epochs=1 if smoke else 12, ce=0.1, kd=0.9)
    config.evaluation = dict(every_epochs=1)
    config.log = dict(every_steps=20, tensorboard=False)
    config.mesh = dict(data=-1, fsdp=1)
    return config


def _cifar100(teacher: str, student: str) -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.run = ("teacher", "student_alone", "student")
    config.precision = "float32"
    config.networks = dict(
        teacher=dict(name=teacher),
        student_alone=dict(name=student),
        student=dict(name=student),
    )
    config.data = dict(source="cifar100", path=config_dict.placeholder(str))
    config.data.update(batch_size=64, workers=0, on_error="raise")
    config.data.augment = dict(
        flip="horizontal",
        pad_crop=4,
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
    )
    optimizer = dict(
        name="sgd",
        learning_rate=0.05,
        schedule="multistep",
        milestones=(150, 180, 210),
        factor=0.1,
        momentum=0.9,
        weight_decay=5e-4,
    )
    _stages(config, optimizer, epochs=240, ce=0.1, kd=0.9)
    config.evaluation = dict(every_epochs=10)
    config.log = dict(every_steps=100, tensorboard=False)
    config.mesh = dict(data=-1, fsdp=1)
    return config
