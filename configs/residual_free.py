"""Networks without skip connections, taught by networks that have them.

Commands:
    python -m jaxkd.main --config=configs/residual_free.py --workdir=runs/plain
    python -m jaxkd.main --config=configs/residual_free.py:cifar100-32 \
        --config.data.path=data/cifar-100-python --workdir=runs/plain32

The question of Jha, Saini, Mittal, "On the Demystification of Knowledge Distillation: A
Residual Network Perspective", 2020: can a student without skips, with a teacher, equal
the same student with skips and without a teacher? The run answers it for one depth:
students with and without skips, alone and taught by a larger, an equal and a smaller
residual teacher. The paper published no code; every setting here is ours.

Variants: `digits` (depth 14, default), `smoke`, and `cifar100-DEPTH` with depth 20, 32,
44, 56 or 110 (which has no larger teacher). From depth 56 on the plain networks need
the warm-up of five epochs and the clipped gradient that all students then get.
"""

import shared
from ml_collections import ConfigDict

DEPTHS = (8, 14, 20, 32, 44, 56, 110)


def get_config(arg: str = "") -> ConfigDict:
    known = ("digits", "smoke", *(f"cifar100-{d}" for d in DEPTHS[2:]))
    kind = shared.variant(arg, "residual_free.py", *known)
    data, _, depth = kind.partition("-")
    config, optimizer, epochs = shared.classification(data, epochs=10)
    depth = int(depth or 14)
    place = DEPTHS.index(depth)
    sizes = {"equal": depth, "smaller": DEPTHS[place - 1]}
    if depth != DEPTHS[-1]:
        sizes = {"larger": DEPTHS[place + 1], **sizes}
    factor = 1.0 if data == "cifar100" else 0.5
    students = dict(optimizer)
    if depth >= 56:
        students.update(warmup_epochs=5.0, clip_norm=5.0)

    def network(depth: int, skip: str = "all") -> dict:
        return dict(name=f"resnet{depth}", skip=skip, width_factor=factor)

    networks, stages = {}, {}

    def add(name: str, network: dict, teacher: str = "") -> None:
        networks[name] = network
        stages[name] = dict(
            method=shared.recipe("kd" if teacher else "none"),
            teachers=(teacher,) if teacher else (),
            optimizer=students if "student" in name else optimizer,
            epochs=epochs,
        )

    for size, teacher_depth in sizes.items():
        add(f"teacher_{size}", network(teacher_depth))
    for kind_of, skip in {"residual": "all", "plain": "none"}.items():
        add(f"student_{kind_of}", network(depth, skip))
        for size in sizes:
            add(f"student_{kind_of}_{size}", network(depth, skip), f"teacher_{size}")
    config.networks = networks
    return shared.stages(config, **stages)
