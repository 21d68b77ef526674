"""HLFD: a small student of CT segmentation, taught by a U-Net++.

Commands:
    python -m jaxkd.main --config=configs/hlfd.py --workdir=runs/hlfd
    python -m jaxkd.main --config=configs/hlfd.py:smoke --workdir=runs/smoke
    python -m jaxkd.main --config=configs/hlfd.py:lits \
        --config.data.path=/data/lits --config.data.cache=/data/lits-cache \
        --workdir=runs/lits
    python -m jaxkd.main --config=configs/hlfd.py:sample,method=hifd --workdir=...

Variants:
    sample   the shipped liver slices at 128x128 with narrow networks, the default.
    smoke    the same for a few seconds at 64x64.
    lits, kits   tumour segmentation at the scale of the paper: 384x384 crops, full
        U-Net++ teacher (100 epochs) and ResNet-18 student (120 epochs), the recipe of
        the authors' code. Meant for a GPU or TPU.
    table    as sample, with one student for every method below.
After a comma, `method=NAME` trains the student by another method: `hlfd_learned`
(projections learned with the student), `hlfd_fixed` (sampled once), or the baselines of
the same code `seg_at`, `seg_skd`, `seg_deep`, `hifd`, `ifd`, `emkd`.

Expected: see docs/methods/hlfd.md.
"""

import shared
from ml_collections import ConfigDict, config_dict

VARIANTS = ("sample", "smoke", "table", "lits", "kits")
METHODS = (
    "hlfd",
    "hlfd_learned",
    "hlfd_fixed",
    "seg_at",
    "seg_skd",
    "seg_deep",
    "hifd",
    "ifd",
    "emkd",
)


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
    config.precision = "float32"
    students = {"student_alone": "none", "student": method}
    if variant == "table":
        students = {"student_alone": "none", **{name: name for name in METHODS}}
    if variant in ("lits", "kits"):
        _paper(config, students, source={"lits": "lits", "kits": "kits19"}[variant])
    else:
        _sample(config, students, smoke=variant == "smoke")
    config.mesh = dict(data=-1, fsdp=1)
    return config


def _transfer(method: str) -> dict:
    """The part of the loss that comes from the teacher."""
    name, _, projection = method.partition("_")
    if method == "none":
        return {}
    if name == "hlfd":
        options = dict(alpha=0.1, beta=0.9, temperature=4.0)
        return dict(
            hlfd=dict(weight=1.0, projection=projection or "resample", **options)
        )
    return {method: dict(weight=1.0)}


def _stages(
    config: ConfigDict,
    students: dict[str, str],
    *,
    width_factor: float,
    optimizer: dict,
    epochs: tuple[int, int],
):
    """The teacher, then one student for each of `students` (network -> method)."""
    task = dict(focal_dice=dict(weight=1.0))
    config.networks = dict(teacher=dict(name="unetpp", width_factor=width_factor))
    config.stages = dict(
        teacher=dict(method=task, epochs=epochs[0], optimizer=optimizer)
    )
    for student, method in students.items():
        config.networks[student] = dict(name="resnet18_seg", width_factor=width_factor)
        config.stages[student] = dict(
            teachers=() if method == "none" else ("teacher",),
            method=dict(**task, **_transfer(method)),
            epochs=epochs[1],
            optimizer=optimizer,
        )
    config.run = ("teacher", *students)


def _sample(config: ConfigDict, students: dict[str, str], *, smoke: bool):
    shared_config, optimizer, width_factor = shared.liver(smoke=smoke)
    config.update(shared_config)
    _stages(
        config,
        students,
        width_factor=width_factor,
        optimizer=optimizer,
        epochs=(1, 1) if smoke else (12, 16),
    )


def _paper(config: ConfigDict, students: dict[str, str], *, source: str):
    config.data = dict(
        source=source,
        path=config_dict.placeholder(str),
        target="tumor",
        slices="target",
        # A folder for unpacked volumes; without it every slice unpacks its volume.
        cache=config_dict.placeholder(str),
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
    _stages(config, students, width_factor=1.0, optimizer=optimizer, epochs=(100, 120))
    config.precision = "bfloat16"
    config.evaluation = dict(every_epochs=5, threshold=0.4, batch_size=8)
    config.log = dict(every_steps=50, tensorboard=False)
    config.notes = (
        "Only slices that contain the target are used, for training and for testing, "
        "as in the authors' code: optimistic against whole volumes.",
    )
