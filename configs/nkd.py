"""NKD: normalised knowledge of the classes beside the target.

Commands:
    python -m jaxkd.main --config=configs/nkd.py --workdir=runs/nkd
    python -m jaxkd.main --config=configs/nkd.py:cifar100 \
        --config.data.path=data/cifar-100-python --workdir=runs/nkd-cifar

Variants:
    digits, smoke   a toy set: default, and for a few seconds.
    cifar100        ResNet-34 teaches ResNet-18, temperature 3, gamma 3.5: batch 128,
        200 epochs, rate 0.1, times 0.2 after 60, 120 and 160, weight decay 5e-4.
    cifar100-effective   what the authors' configuration really runs, as it writes these
        settings under keys that its framework ignores: weight decay 1e-4, times 0.1
        after epochs 100 and 150.

Expected: see docs/methods/nkd.md and docs/methods/table.md.
"""

import shared
from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    kind = shared.variant(
        arg, "nkd.py", "digits", "smoke", "cifar100", "cifar100-effective"
    )
    config, optimizer, epochs = shared.classification(kind.split("-")[0], epochs=12)
    teacher = dict(name="resnet20", width_factor=0.5)
    student = dict(name="resnet8", width_factor=0.5)
    if kind.startswith("cifar100"):
        effective = kind.endswith("effective")
        config.data.batch_size, epochs = 128, 200
        optimizer |= dict(
            learning_rate=0.1,
            milestones=(100, 150) if effective else (60, 120, 160),
            factor=0.1 if effective else 0.2,
            weight_decay=1e-4 if effective else 5e-4,
        )
        teacher = dict(name="resnet34", stem="cifar")
        student = dict(name="resnet18", stem="cifar")
    return shared.pair(
        config,
        "nkd",
        teacher=teacher,
        student=student,
        optimizer=optimizer,
        epochs=epochs,
        first=1,
    )
