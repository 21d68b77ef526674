"""Hard mini-batches: train on the batches that last had the largest loss.

Commands:
    python -m jaxkd.main --config=configs/hard_batches.py --workdir=runs/hard
    python -m jaxkd.main --config=configs/hard_batches.py:smoke --workdir=runs/smoke
    python -m jaxkd.main --config=configs/hard_batches.py:kd --workdir=runs/hard-kd
    python -m jaxkd.main --config=configs/hard_batches.py:cifar100 \
        --config.data.path=data/cifar-100-python --workdir=runs/hard-cifar

Variants:
    digits   scikit-learn's 8x8 digits, the default: all batches and hard ones.
    smoke    the same for a few seconds.
    kd       digits, and the student on hard batches is taught.
    cifar100 ResNet-18 on CIFAR-100 as published: batch 512, SGD with momentum 0.9 and a
        constant rate of 0.005, no weight decay, no augmentation, 100 epochs, images at
        128 pixels, normalised with the moments of ImageNet.

`--config.stages.hard.select.delta=0.2` keeps another share of the batches. Both
networks of a config make the same number of steps.
"""

import shared
from ml_collections import ConfigDict

VARIANTS = ("digits", "smoke", "kd", "cifar100")


def get_config(arg: str = "") -> ConfigDict:
    variant = arg or "digits"
    if variant not in VARIANTS:
        raise ValueError(
            f"configs/hard_batches.py has no variant {arg!r}; take one of "
            f"{', '.join(VARIANTS)}"
        )
    config = _cifar100() if variant == "cifar100" else _digits(variant)
    config.stages.hard.select = dict(name="hard_batches", delta=0.5)
    return config


def _digits(variant: str) -> ConfigDict:
    config, optimizer, epochs = shared.classification(
        "smoke" if variant == "smoke" else "digits", epochs=12
    )
    epochs = max(epochs, 2)  # hard batches begin in the second
    # Batches are fixed, and so is what they show.
    config.data.augment = dict(pad_crop=0)
    config.data.batch_size = 32
    config.train = dict(resident=True)
    student = dict(name="resnet8", width_factor=0.5)
    common = dict(method=dict(ce=dict(weight=1.0)), epochs=epochs, optimizer=optimizer)
    config.run = ("all", "hard")
    config.networks = dict(all=dict(student), hard=dict(student))
    config.stages = ConfigDict(dict(all=dict(common), hard=dict(common)))
    if variant == "kd":
        config.run = ("teacher", "all", "hard")
        config.networks.teacher = dict(name="resnet14", width_factor=1.0)
        taught = dict(
            teachers=("teacher",),
            method=dict(ce=dict(weight=0.1), kd=dict(weight=0.9, temperature=4.0)),
        )
        config.stages = ConfigDict(
            dict(
                teacher=dict(common),
                all=dict(common, **taught),
                hard=dict(common, **taught),
            )
        )
    return config


def _cifar100() -> ConfigDict:
    config, _, _ = shared.classification("cifar100", epochs=100)
    config.data.batch_size = 512
    config.data.augment = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    optimizer = dict(name="sgd", learning_rate=0.005, schedule="constant", momentum=0.9)
    common = dict(method=dict(ce=dict(weight=1.0)), epochs=100, optimizer=optimizer)
    config.run = ("all", "hard")
    student = dict(name="resnet18", input=dict(image_size=(128, 128)))
    config.networks = dict(all=dict(student), hard=dict(student))
    config.stages = ConfigDict(dict(all=dict(common), hard=dict(common)))
    return config
