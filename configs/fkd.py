"""FKD: training on soft labels of crops, which a teacher gave once.

Commands:
    python -m jaxkd.main --config=configs/fkd.py --workdir=runs/fkd
    python -m jaxkd.main --config=configs/fkd.py:label --workdir=runs/fkd-labels \
        --mode=label
    python -m jaxkd.main --config=configs/fkd.py:stored --workdir=runs/fkd-stored \
        --config.data.regions=runs/fkd-labels/targets/student/regions.npz

Variants:
    live     the teacher labels every crop as it comes, and its answer is cut down to
        what a file would hold (five classes and the rest): default, on digits.
    smoke    the same for a few seconds.
    label    trains the teacher and has it label 16 crops of every image, for `stored`.
    stored   crops and labels come from the file that `label` wrote; four crops of every
        image at a time, no teacher.

Expected: see docs/methods/fkd.md.
"""

import shared
from ml_collections import ConfigDict, config_dict


def get_config(arg: str = "") -> ConfigDict:
    kind = shared.variant(arg, "fkd.py", "live", "smoke", "label", "stored")
    data = "smoke" if kind == "smoke" else "digits"
    config, optimizer, epochs = shared.classification(data, epochs=12)
    teacher = dict(name="resnet20", width_factor=0.5)
    student = dict(name="resnet8", width_factor=0.5)
    if kind != "stored":
        shared.pair(
            config,
            "fkd",
            teacher=teacher,
            student=student,
            optimizer=optimizer,
            epochs=epochs,
            first=1,
        )
        if kind == "label":
            config.stages.student.targets = dict(regions=16)
        return config
    config.data.regions = config_dict.placeholder(str)
    config.data.region_crops = 4
    config.data.augment = dict()
    config.networks = dict(student=student)
    return shared.stages(
        config,
        student=dict(
            method=dict(fkd=dict(labels="stored")), optimizer=optimizer, epochs=epochs
        ),
    )
