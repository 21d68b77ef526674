"""BottleFit: a network cut in two, with a narrow quantised bottleneck between.

Commands:
    python -m jaxkd.main --config=configs/bottlefit.py --workdir=runs/bottlefit
    python -m jaxkd.main --config=configs/bottlefit.py:digits,ghnd-ft --workdir=...
    python -m jaxkd.main --config=configs/bottlefit.py:seg --workdir=runs/bottlefit-seg
    python -m jaxkd.main --config=configs/bottlefit.py:cifar100 \
        --config.data.path=data/cifar-100-python --workdir=runs/bottlefit-cifar

The student starts from the teacher's weights. In its first stage only encoder and
decoder learn, by generalised head-network distillation; in the second the rest learns
as well. It is evaluated as it is used: with the bottleneck quantised to 8 bits. The
table of the run tells the bytes sent per image.

Variants: `digits` (default), `smoke`, `cifar100` (ResNet-34), `seg` (the shipped liver
slices), `seg-smoke`; then after a comma how the second stage learns:
    ghnd-kd-fe   labels and the teacher, encoder frozen (default).
    ghnd-kd      labels and the teacher, everything learns.
    ghnd-ft-fe   labels alone, encoder frozen.
    ghnd-ft      labels alone, everything learns.
    hnd-ft       the first stage matches the cut layer alone (head-network
        distillation), the second as ghnd-ft.

Expected: see docs/methods/ghnd.md.
"""

import shared
from ml_collections import ConfigDict

KINDS = ("digits", "smoke", "cifar100", "seg", "seg-smoke")
SECOND = ("ghnd-kd-fe", "ghnd-kd", "ghnd-ft-fe", "ghnd-ft", "hnd-ft")


def get_config(arg: str = "") -> ConfigDict:
    kind, _, second = arg.partition(",")
    kind = shared.variant(kind, "bottlefit.py", *KINDS)
    second = shared.variant(second, "bottlefit.py", *SECOND)
    bits = dict(bits=8)
    if kind.startswith("seg"):
        config, optimizer, factor = shared.liver(smoke=kind.endswith("smoke"))
        task = dict(focal_dice=dict(weight=1.0))
        teacher_epochs, epochs = (1, 1) if kind.endswith("smoke") else (12, 6)
        config.networks = dict(
            teacher=dict(name="resnet18_seg", width_factor=factor),
            student=dict(
                name="bottlefit_seg",
                bottleneck_channels=3,
                width_factor=factor,
                **bits,
            ),
        )
    else:
        config, optimizer, teacher_epochs = shared.classification(kind, epochs=12)
        task = dict(ce=dict(weight=1.0))
        epochs = max(2, teacher_epochs // 2) if kind == "digits" else 1
        base = dict(base="resnet20", width_factor=1.0)
        if kind == "cifar100":
            base, epochs = dict(base="resnet34", stem="cifar"), 10
        teacher = {k: v for k, v in base.items() if k != "base"}
        config.networks = dict(
            teacher=dict(name=base["base"], **teacher),
            student=dict(name="bottlefit", bottleneck_channels=3, **base, **bits),
        )
    head = "hnd" if second.startswith("hnd") else "ghnd"
    if "-kd" in second:
        task = {
            **{k: dict(weight=0.5) for k in task},
            "kd": dict(weight=0.5, temperature=1.0),
        }
    step = max(1, epochs // 2)
    drop = dict(schedule="multistep", milestones=(step,)) if epochs > 1 else {}
    encoder = ("trunk/bottleneck/encoder",) if second.endswith("-fe") else ()
    return shared.stages(
        config,
        teacher=dict(
            method={k: dict(weight=1.0) for k in task if k != "kd"},
            optimizer=optimizer,
            epochs=teacher_epochs,
        ),
        student_head=dict(
            learner="student",
            method={head: _taps(kind, head)},
            teachers=("teacher",),
            start_from="teacher",
            freeze=("^(?!trunk/bottleneck/)",),
            optimizer=dict(name="adam", learning_rate=1e-3, **drop),
            epochs=epochs,
        ),
        student=dict(
            method=task,
            teachers=("teacher",) if "kd" in task else (),
            freeze=encoder,
            optimizer=dict(
                name="sgd",
                learning_rate=1e-3,
                momentum=0.9,
                weight_decay=5e-4,
                **drop,
            ),
            epochs=epochs,
        ),
    )


def _taps(kind: str, head: str) -> dict:
    """The segmentation networks name their taps otherwise."""
    if not kind.startswith("seg"):
        return {}
    if head == "hnd":
        return dict(student_tap="e3", teacher_tap="e3")
    return dict(student_taps=("e3", "e4", "e5"), teacher_taps=("e3", "e4", "e5"))
