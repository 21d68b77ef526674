"""HLFD: a small student of CT segmentation, taught by a U-Net++.

Commands:
    python -m jaxkd.main --config=configs/hlfd.py --workdir=runs/hlfd
    python -m jaxkd.main --config=configs/hlfd.py:smoke --workdir=runs/smoke
    python -m jaxkd.main --config=configs/hlfd.py:lits \
        --config.data.path=/data/lits --workdir=runs/lits
    python -m jaxkd.main --config=configs/hlfd.py:sample,method=hifd --workdir=...

Variants:
    sample   the shipped liver slices at 128x128 with narrow networks, the default.
    smoke    the same for a few seconds at 64x64.
    lits, kits   tumour segmentation at the scale of the paper: 384x384 crops, full
        U-Net++ teacher (100 epochs) and ResNet-18 student (120 epochs), the recipe of
        the authors' code. Meant for a GPU or TPU.
After a comma, `method=NAME` trains the student by another method of the same code:
`seg_at`, `seg_skd`, `seg_deep`, `hifd`, `ifd`, `emkd`.

Expected: see docs/methods/hlfd.md.
"""

from ml_collections import ConfigDict, config_dict

VARIANTS = ("sample", "smoke", "lits", "kits")
METHODS = ("hlfd", "seg_at", "seg_skd", "seg_deep", "hifd", "ifd", "emkd")


def get_config(arg: str = "") -> ConfigDict:
    variant, _, rest = (arg or "sample").partition(",")
    key, _, method = (rest or "method=hlfd").partition("=")
    if variant not in VARIANTS or key != "method" or method not in METHODS:
        raise ValueError(
            f"configs/hlfd.py has no variant {arg!r}; take one of "
            f"{', '.join(VARIANTS)}, then ,method= one of {', '.join(METHODS)}"
        )
    config = ConfigDict()
    config.seed = 0
    config.run = ("teacher", "student_alone", "student")
    config.precision = "float32"
    if variant in ("sample", "smoke"):
        _sample(config, method, smoke=variant == "smoke")
    else:
        _paper(config, method, source={"lits": "lits", "kits": "kits19"}[variant])
    config.mesh = dict(data=-1, fsdp=1)
    return config


def _networks(config: ConfigDict, width_factor: float):
    student = dict(name="resnet18_seg", width_factor=width_factor)
    config.networks = dict(
        teacher=dict(name="unetpp", width_factor=width_factor),
        student_alone=dict(student),
        student=dict(student),
    )


def _stages(config: ConfigDict, method: str, optimizer: dict, epochs: tuple[int, int]):
    task = dict(focal_dice=dict(weight=1.0))
    transfer = {method: dict(weight=1.0)}
    if method == "hlfd":
        transfer = dict(
            hlfd=dict(
                weight=1.0, alpha=0.1, beta=0.9, temperature=4.0, projection="resample"
            )
        )
    config.stages = dict(
        teacher=dict(method=task, epochs=epochs[0], optimizer=optimizer),
        student_alone=dict(method=task, epochs=epochs[1], optimizer=optimizer),
        student=dict(
            teachers=("teacher",),
            method=dict(**task, **transfer),
            epochs=epochs[1],
            optimizer=optimizer,
        ),
    )


def _sample(config: ConfigDict, method: str, *, smoke: bool):
    _networks(config, width_factor=1 / 16 if smoke else 1 / 8)
    config.data = dict(
        source="liver_ct_sample",
        path=config_dict.placeholder(str),
        image_size=64 if smoke else 128,
        batch_size=8,
        workers=0,
        on_error="raise",
    )
    config.data.augment = dict(rotate=15.0, brightness=0.1, contrast=0.1)
    optimizer = dict(
        name="adam",
        learning_rate=3e-3,
        schedule="cosine",
        end_learning_rate=1e-6,
        granularity="epoch",
    )
    _stages(config, method, optimizer, epochs=(1, 1) if smoke else (20, 24))
    config.evaluation = dict(every_epochs=2, threshold=0.4, batch_size=8)
    config.log = dict(every_steps=20, tensorboard=False)
    config.notes = (
        "Liver in CT slices (MSD Task03 / LiTS, CC BY-SA 4.0), split by volume; "
        "about 160 training slices.",
    )


def _paper(config: ConfigDict, method: str, *, source: str):
    _networks(config, width_factor=1.0)
    config.data = dict(
        source=source,
        path=config_dict.placeholder(str),
        target="tumor",
        slices="target",
        batch_size=8,
        workers=4,
        on_error="raise",
    )
    config.data.augment = dict(flip="both", rot90=True, crop_box=(50, 434, 60, 444))
    optimizer = dict(
        name="adam",
        learning_rate=1e-2,
        schedule="cosine",
        end_learning_rate=1e-6,
        granularity="epoch",
    )
    _stages(config, method, optimizer, epochs=(100, 120))
    config.precision = "bfloat16"
    config.evaluation = dict(every_epochs=5, threshold=0.4, batch_size=8)
    config.log = dict(every_steps=50, tensorboard=False)
    config.notes = (
        "Only slices that contain the target are used, for training and for testing, "
        "as in the authors' code: optimistic against whole volumes.",
    )
