"""DML: students that learn together, each from the others, without a teacher.

Commands:
    python -m jaxkd.main --config=configs/dml.py --workdir=runs/dml
    python -m jaxkd.main --config=configs/dml.py:cifar100 \
        --config.data.path=data/cifar-100-python --workdir=runs/dml-cifar

Variants: `digits` (three students of two architectures, default), `smoke`, `cifar100`
(ResNet-32 and WRN-16-2).

Expected: see docs/methods/dml.md.
"""

import shared
from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    kind = shared.variant(arg, "dml.py", "digits", "smoke", "cifar100")
    config, optimizer, epochs = shared.classification(kind, epochs=12)
    peers = dict(
        peer1=dict(name="resnet8", width_factor=0.5),
        peer2=dict(name="resnet8", width_factor=0.5),
        peer3=dict(name="resnet14", width_factor=0.5),
    )
    if kind == "cifar100":
        peers = dict(peer1=dict(name="resnet32"), peer2=dict(name="wrn_16_2"))
    config.networks = dict(alone=dict(peers["peer1"]), **peers)
    common = dict(optimizer=optimizer, epochs=epochs)
    return shared.stages(
        config,
        alone=dict(method=shared.CE, **common),
        together=dict(
            method=dict(dml=dict(students=len(peers))),
            learner=tuple(peers),
            **common,
        ),
    )
