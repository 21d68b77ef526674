"""Vector-quantised kernels (LR2VQ) on digits: codes, a codebook and a projection.

Commands:
    python -m jaxkd.main --config=configs/vq.py --workdir=runs/vq
    python -m jaxkd.main --config=configs/vq.py:lr2vq-kd --workdir=runs/vq-kd
    python -m jaxkd.main --config=configs/vq.py:smoke --workdir=runs/vq-smoke

Three networks of one architecture: `float` is trained as it is, `low_rank` starts from
it and trains the representation, and `student` starts from that and is quantised.

Variants: `lr2vq` (default); `lr2vq-kd`, in which `float` teaches the student; `smoke`.

Expected: see docs/sparsity.md. Nothing is tuned.
"""

import shared
from ml_collections import ConfigDict

NETWORK = dict(name="resnet8", width_factor=1.0)
# Nine numbers are the taps of one input and output of a 3 x 3 convolution.
QUANTIZER = dict(size=9, dim=4)
CLUSTERS = 16


def get_config(arg: str = "") -> ConfigDict:
    kind = shared.variant(arg, "vq.py", "lr2vq", "lr2vq-kd", "smoke")
    config, optimizer, epochs = shared.classification(
        "smoke" if kind == "smoke" else "digits", epochs=12
    )
    config.networks = dict(
        float=dict(NETWORK),
        low_rank=dict(NETWORK, compress=dict(lr2vq=dict(QUANTIZER, clusters=None))),
        student=dict(NETWORK, compress=dict(lr2vq=dict(QUANTIZER, clusters=CLUSTERS))),
    )
    taught = kind == "lr2vq-kd"
    # Networks that are trained already.
    slower = dict(optimizer, learning_rate=optimizer["learning_rate"] / 10)

    return shared.stages(
        config,
        float=dict(method=shared.recipe("none"), optimizer=optimizer, epochs=epochs),
        low_rank=dict(
            method=shared.recipe("none"),
            start_from="float",
            optimizer=slower,
            epochs=epochs,
        ),
        student=dict(
            method=shared.recipe("kd" if taught else "none"),
            teachers=("float",) if taught else (),
            start_from="low_rank",
            optimizer=slower,
            epochs=epochs,
        ),
    )
