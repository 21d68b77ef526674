"""Teacher, student and method of your choice on CIFAR-100, by the 240-epoch protocol.

Command:
    python -m jaxkd.main --config=configs/cifar100.py:resnet32x4-resnet8x4-dkd \
        --config.data.path=data/cifar-100-python --workdir=runs/cifar100-dkd

Variants: `TEACHER-STUDENT-METHOD`, the methods being the keys of `RECIPES` in
configs/shared.py. A fourth part sets the global batch, which the learning rate
follows linearly: `resnet32x4-resnet8x4-dkd-256`. `smoke` is for a few seconds, on
digits.

Protocol: SGD with momentum 0.9, weight decay 5e-4, batch 64, 240 epochs, learning
rate 0.05 (0.01 for MobileNet and ShuffleNet students), times 0.1 after epochs 150, 180
and 210; crop with padding 4 and flip. The last step is handed on. Published tables
often report the best epoch on the test set, which reads higher.

Hardware and time: one GPU, hours; nothing here has been trained in full yet.
"""

import shared
from ml_collections import ConfigDict

SLOW = ("mobilenet", "shufflenet")


def get_config(arg: str = "resnet32x4-resnet8x4-kd") -> ConfigDict:
    if arg == "smoke":
        return _smoke()
    teacher, student, method, batch_size = _parse(arg or "resnet32x4-resnet8x4-kd")
    config = shared.base(log_every=100, evaluate_every=10)
    config.data = shared.cifar100(batch_size)
    rate = 0.01 if student.startswith(SLOW) else 0.05
    shared.pair(
        config,
        method,
        teacher=_network(teacher),
        student=_network(student),
        optimizer=shared.cifar100_optimizer(batch_size),
        student_optimizer=shared.cifar100_optimizer(batch_size, learning_rate=rate),
        method_optimizer=shared.cifar100_optimizer(
            batch_size,
            # The authors of MLLD halve the rate.
            learning_rate=rate / 2 if method.startswith("mlld") else rate,
        ),
        epochs=240,
        first=30,
    )
    return config


def _network(name: str) -> dict:
    # The ImageNet networks of the tables have a stem for small images.
    small = name in ("resnet18", "resnet34", "resnet50")
    return dict(name=name, stem="cifar") if small else dict(name=name)


def _parse(arg: str) -> tuple[str, str, str, int]:
    parts = arg.split("-")
    if len(parts) not in (3, 4) or not all(parts):
        raise ValueError(
            f"configs/cifar100.py has no variant {arg!r}; take smoke or "
            "TEACHER-STUDENT-METHOD, e.g. resnet32x4-resnet8x4-kd"
        )
    batch_size = parts[3] if len(parts) == 4 else "64"
    if not batch_size.isdigit() or not int(batch_size):
        raise ValueError(f"the batch size must be a number > 0, got {batch_size!r}")
    shared.recipe(parts[2])
    return parts[0], parts[1], parts[2], int(batch_size)


def _smoke() -> ConfigDict:
    config = shared.base()
    config.data = shared.digits()
    return shared.pair(
        config,
        "dkd",
        teacher=dict(name="resnet8", width_factor=0.5),
        student=dict(name="resnet8", width_factor=0.25),
        optimizer=shared.digits_optimizer(1),
        epochs=1,
        first=1,
    )
