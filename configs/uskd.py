"""USKD: soft labels that the student customises for itself, without a teacher.

Commands:
    python -m jaxkd.main --config=configs/uskd.py --workdir=runs/uskd
    python -m jaxkd.main --config=configs/uskd.py:cifar100 \
        --config.data.path=data/cifar-100-python --workdir=runs/uskd-cifar

Variants:
    digits, smoke   a toy set: default, and for a few seconds.
    cifar100        ResNet-18; alpha, beta and mu 0.1.

Expected: see docs/methods/uskd.md and docs/methods/table.md.
"""

import shared
from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    kind = shared.variant(arg, "uskd.py", "digits", "smoke", "cifar100")
    config, optimizer, epochs = shared.classification(kind, epochs=12)
    student = dict(name="resnet8", width_factor=0.5)
    if kind == "cifar100":
        config.data.batch_size, epochs = 128, 200
        optimizer |= dict(learning_rate=0.1, milestones=(60, 120, 160), factor=0.2)
        student = dict(name="resnet18", stem="cifar")
    return shared.pair(
        config,
        "uskd",
        teacher=student,
        student=student,
        optimizer=optimizer,
        epochs=epochs,
        first=1,
    )
