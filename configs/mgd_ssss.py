"""MGD: two complementary teachers, labelled and unlabelled images together.

Commands:
    python -m jaxkd.main --config=configs/mgd_ssss.py --workdir=runs/mgd
    python -m jaxkd.main --config=configs/mgd_ssss.py:smoke --workdir=runs/mgd-smoke

Semi-supervised segmentation (Qin et al., "Multi-Granularity Distillation Scheme Towards
Lightweight Semi-Supervised Semantic Segmentation", ECCV 2022): a wide, shallow and a
narrow, deep teacher are trained on the labelled volumes; the student then learns from
the labels, from pseudo-labels of mixed unlabelled images, and from both teachers on the
level of images, regions and pixels.

Variants: `sample` (default; the shipped liver slices, a quarter of the volumes
labelled), `smoke`. The published networks (DeepLabV3+) and data (VOC, Cityscapes) are
not here: this is the method on other networks.

Expected: see docs/methods/mgd_ssss.md.
"""

import shared
from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    kind = shared.variant(arg, "mgd_ssss.py", "sample", "smoke")
    smoke = kind == "smoke"
    config, optimizer, factor = shared.liver(smoke=smoke)
    config.data.labelled_fraction = 0.25
    config.data.unlabelled_batch_size = 16
    config.networks = dict(
        wide=dict(name="unet", width_factor=factor),
        deep=dict(name="unetpp", width_factor=factor),
        student_alone=dict(name="resnet18_seg", width_factor=factor),
        student=dict(name="resnet18_seg", width_factor=factor),
    )
    common = dict(optimizer=optimizer, epochs=1 if smoke else 16)
    # The labelled part of the method is the plain cross-entropy, and so is that of all
    # networks here, so that the student's rows differ by the method alone.
    supervised = dict(method=shared.CE, **common)
    return shared.stages(
        config,
        wide=supervised,
        deep=supervised,
        student_alone=supervised,
        student=dict(
            # lambda_1 weighs a sum over the images: 0.002 is for 2 of them, here are 8.
            method=dict(mgd_ssss=dict(lambda_1=0.0005, lambda_2=100.0)),
            teachers=("wide", "deep"),
            **common,
        ),
    )
