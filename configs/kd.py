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

import shared
from ml_collections import ConfigDict


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
    config, optimizer, epochs = shared.classification(
        "smoke" if smoke else "digits", epochs=12
    )
    optimizer = {k: v for k, v in optimizer.items() if k != "clip_norm"}
    optimizer["warmup_epochs"] = 0.5
    config.run = ("teacher", "student_alone", "student")
    student = dict(name="resnet8", width_factor=0.5)
    config.networks = dict(
        teacher=dict(name="resnet14", width_factor=1.0),
        student_alone=dict(student),
        student=dict(student),
    )
    _stages(config, optimizer, epochs=epochs, ce=0.1, kd=0.9)
    return config


def _cifar100(teacher: str, student: str) -> ConfigDict:
    config, optimizer, epochs = shared.classification("cifar100", epochs=240)
    config.run = ("teacher", "student_alone", "student")
    config.networks = dict(
        teacher=dict(name=teacher),
        student_alone=dict(name=student),
        student=dict(name=student),
    )
    _stages(config, optimizer, epochs=epochs, ce=0.1, kd=0.9)
    return config
