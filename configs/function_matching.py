"""A patient and consistent teacher: the student matches a function, for long.

Commands:
    python -m jaxkd.main --config=configs/function_matching.py --workdir=runs/fm
    python -m jaxkd.main --config=configs/function_matching.py:cifar100 \
        --config.data.path=data/cifar-100-python --workdir=runs/fm-cifar

Teacher and student see the same crop, flip and mixup; no label is used. The teacher is
trained on mixed images too.

Variants:
    digits     36 epochs against 12 of the teacher, the default.
    smoke      for a few seconds.
    cifar100   ResNet-32x4 teaches ResNet-8x4 for 1,200 epochs: Adam 0.03 at batch 4096,
        scaled to batch 512; decoupled weight decay; clipped at norm 1.

Expected: see docs/methods/function_matching.md.
"""

import shared
from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    kind = shared.variant(arg, "function_matching.py", "digits", "smoke", "cifar100")
    config, optimizer, epochs = shared.classification(kind, epochs=12)
    config.networks = dict(
        teacher=dict(name="resnet20", width_factor=0.5),
        student=dict(name="resnet8", width_factor=0.5),
    )
    patient = 3 * epochs
    learning = dict(
        name="adamw",
        learning_rate=3e-3,
        schedule="cosine",
        warmup_epochs=0.5,
        weight_decay=1e-3,
        weight_decay_mask="kernels",
        clip_norm=1.0,
    )
    if kind == "cifar100":
        config.networks = dict(
            teacher=dict(name="resnet32x4"), student=dict(name="resnet8x4")
        )
        config.data.batch_size, patient = 512, 1200
        learning.update(learning_rate=0.03 * 512 / 4096, warmup_epochs=15.0)
        optimizer = shared.cifar100_optimizer(512)
    teacher = dict(method=shared.CE, optimizer=optimizer, epochs=epochs)
    config.data.augment.mixup = 1.0
    return shared.stages(
        config,
        teacher=teacher,
        student=dict(
            method=shared.recipe("function_matching"),
            teachers=("teacher",),
            optimizer=learning,
            epochs=patient,
        ),
    )
