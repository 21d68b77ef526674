"""Pruning: PDP, LAPP, and step by step by magnitude while a teacher teaches.

Commands:
    python -m jaxkd.main --config=configs/prune.py:smoke --workdir=runs/prune-smoke
    python -m jaxkd.main --config=configs/prune.py:pdp \
        --config.data.path=data/cifar-100-python --workdir=runs/pdp
    python -m jaxkd.main --config=configs/prune.py:lapp \
        --config.data.path=data/cifar-100-python --workdir=runs/lapp

Variants:
    pdp          90 % of the weights of a ResNet-20 go by soft masks, the default.
    pdp-nm       2 of 4 consecutive input channels stay.
    pdp-channel  half of the channels go; the network can be made smaller.
    lapp         filters go by learned thresholds until half of the arithmetic is left.
    gmp-kd       90 % of the weights of a student go by magnitude while it is taught.
    pdp-kd       as `pdp`, taught.
    smoke        channels of a small ResNet on digits go by PDP, for a few seconds.

All but `smoke` are on CIFAR-100 (`config.data.path` names the folder of the python
pickles) with the usual 240-epoch recipe. Masks of single weights and N:M masks are
simulated, see docs/sparsity.md. No accuracy of these recipes has been measured yet.
"""

import shared
from ml_collections import ConfigDict

VARIANTS = ("pdp", "pdp-nm", "pdp-channel", "lapp", "gmp-kd", "pdp-kd", "smoke")
COMPRESSIONS = {
    "pdp": dict(pdp=dict(sparsity=0.9)),
    "pdp-nm": dict(pdp=dict(structure="n:m", n=2, m=4)),
    # Norms of channels are larger than weights, and so is what separates them.
    "pdp-channel": dict(pdp=dict(sparsity=0.5, structure="channel", temperature=1e-2)),
    "lapp": dict(lapp=dict(flops=0.5)),
    "gmp-kd": dict(gmp=dict(sparsity=0.9, distribution="erk")),
    "pdp-kd": dict(pdp=dict(sparsity=0.9)),
}


def get_config(arg: str = "") -> ConfigDict:
    variant = shared.variant(arg, "prune.py", *VARIANTS)
    if variant == "smoke":
        return _smoke()
    config, optimizer, epochs = shared.classification("cifar100", epochs=240)
    if variant.endswith("-kd"):
        config = shared.pair(
            config,
            "kd",
            teacher=dict(name="resnet56"),
            student=dict(name="resnet20"),
            optimizer=optimizer,
            epochs=epochs,
            first=0,
            alone=False,
        )
        config.networks.student.compress = COMPRESSIONS[variant]
        return config
    config.networks = dict(
        dense=dict(name="resnet20"),
        pruned=dict(name="resnet20", compress=COMPRESSIONS[variant]),
    )
    stage = dict(method=dict(**shared.CE), optimizer=optimizer, epochs=epochs)
    return shared.stages(config, dense=dict(**stage), pruned=dict(**stage))


def _smoke() -> ConfigDict:
    config, optimizer, _ = shared.classification("smoke", epochs=2)
    compress = dict(
        pdp=dict(
            sparsity=0.5,
            structure="channel",
            temperature=1e-2,
            warmup_epochs=1,
            epsilon=1.0,
        )
    )
    config.networks = dict(
        pruned=dict(name="resnet8", width_factor=0.5, compress=compress)
    )
    stage = dict(method=dict(**shared.CE), optimizer=optimizer, epochs=2)
    return shared.stages(config, pruned=stage)
