"""DeiT: a vision transformer with a distillation token, taught by a convolutional net.

Commands:
    python -m jaxkd.main --config=configs/deit.py --workdir=runs/deit
    python -m jaxkd.main --config=configs/deit.py:cifar100,soft \
        --config.data.path=data/cifar-100-python --workdir=runs/deit-cifar

Variants: `digits` (patches of 2x2, default), `smoke`, `cifar100` (DeiT-Tiny, patches of
4x4, ResNet-32x4 teacher); after a comma `hard` (default) or `soft`.

Expected: see docs/methods/deit.md.
"""

import shared
from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    kind, _, form = arg.partition(",")
    kind = shared.variant(kind, "deit.py", "digits", "smoke", "cifar100")
    form = shared.variant(form, "deit.py", "hard", "soft")
    config, optimizer, epochs = shared.classification(kind, epochs=20)
    small = dict(patch_size=2, width_factor=1 / 3)
    config.networks = dict(
        teacher=dict(name="resnet20", width_factor=0.5),
        student_alone=dict(name="deit_tiny", **small),
        student=dict(name="deit_tiny_distilled", **small),
    )
    if kind == "cifar100":
        small = dict(patch_size=4)
        config.networks = dict(
            teacher=dict(name="resnet32x4"),
            student_alone=dict(name="deit_tiny", **small),
            student=dict(name="deit_tiny_distilled", **small),
        )
        config.data.batch_size = 512
        config.data.augment.update(mixup=0.8, cutmix=1.0)
        optimizer = shared.cifar100_optimizer(512)
    adam = dict(
        name="adamw",
        learning_rate=1e-3 if kind != "cifar100" else 5e-4,
        schedule="cosine",
        end_learning_rate=1e-5,
        warmup_epochs=5.0 if epochs > 5 else 0.5,
        weight_decay=0.05,
        weight_decay_mask="kernels",
        clip_norm=1.0,
    )
    smoothing = dict(ce=dict(label_smoothing=0.1))
    return shared.stages(
        config,
        teacher=dict(method=shared.CE, optimizer=optimizer, epochs=epochs),
        student_alone=dict(method=smoothing, optimizer=adam, epochs=epochs),
        student=dict(
            method=dict(deit=dict(distillation=form, alpha=0.5, label_smoothing=0.1)),
            teachers=("teacher",),
            optimizer=adam,
            epochs=epochs,
        ),
    )
