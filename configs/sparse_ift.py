"""Sparse-IFT: larger sparse layers that cost as much as the dense ones they replace.

Commands:
    python -m jaxkd.main --config=configs/sparse_ift.py:wide \
        --config.data.path=data/cifar-100-python --workdir=runs/sparse-wide
    python -m jaxkd.main --config=configs/sparse_ift.py:doped-kd-0.9 \
        --config.data.path=data/cifar-100-python --workdir=runs/sparse-doped-kd
    python -m jaxkd.main --config=configs/sparse_ift.py:smoke --workdir=runs/sift-smoke

Variants: `wide` (default), `parallel`, `factorized`, `doped`: ResNet-18 on CIFAR-100,
dense and sparse, at equal operations per image. With `-kd` the dense network teaches
the sparse one. A last part is the sparsity, 0.75 without it: `parallel-0.5`,
`wide-kd-0.9`. `smoke` and `smoke-FAMILY` (with `-kd`) are for a few seconds on digits.

Recipe (Thangarasa et al., "Sparse-IFT", ICML 2024, and the authors' code): SGD with
Nesterov momentum 0.9, weight decay 5e-4 on everything, batch 128, 200 epochs, learning
rate 0.1, times 0.2 after epochs 61, 121 and 161; RigL every 100 steps up to three
quarters of them, drop fraction 0.3, uniform sparsity. Another schedule of masks:
`--config.networks.student.compress.sparse_ift.updates=static` (or set, granet).

What is equal is the number of operations, zeros left out. On dense hardware the sparse
network is as slow as its layers are large.

Hardware and time: one GPU, hours; nothing here has been trained in full yet.
"""

import shared
from ml_collections import ConfigDict

FAMILIES = ("wide", "parallel", "factorized", "doped")
KD = dict(ce=dict(weight=0.1), kd=dict(weight=0.9, temperature=4.0))


def get_config(arg: str = "") -> ConfigDict:
    smoke, family, taught, sparsity = _parse(arg or "wide")
    config = shared.base(log_every=100, evaluate_every=10)
    if smoke:
        config, optimizer, epochs = shared.classification("smoke", epochs=1)
        network = dict(name="resnet8", width_factor=0.5)
    else:
        config.data = shared.cifar100(128)
        optimizer, epochs = _optimizer(), 200
        network = dict(name="resnet18", stem="cifar")
    sparse = dict(family=family, sparsity=sparsity, updates="rigl")
    # An epoch of digits has 22 steps.
    sparse["schedule"] = dict(frequency=5 if smoke else 100, drop_fraction=0.3)
    config.networks = dict(
        dense=dict(network),
        student=dict(network, compress=dict(sparse_ift=sparse)),
    )
    common = dict(optimizer=optimizer, epochs=epochs)
    student = dict(method=shared.CE, **common)
    if taught:
        student = dict(method=KD, teachers=("dense",), **common)
    return shared.stages(
        config, dense=dict(method=shared.CE, **common), student=student
    )


def _optimizer() -> dict:
    return dict(
        name="sgd",
        learning_rate=0.1,
        schedule="multistep",
        # The authors' scheduler is told the epoch that is over: one later than it says.
        milestones=(61, 121, 161),
        factor=0.2,
        momentum=0.9,
        nesterov=True,
        weight_decay=5e-4,
        weight_decay_mask="all",
    )


def _parse(arg: str) -> tuple[bool, str, bool, float]:
    """Whether it is for a few seconds, the family, whether it is taught, sparsity."""
    parts = arg.split("-")
    smoke = parts[0] == "smoke"
    if smoke:
        parts = parts[1:] or ["wide"]
        if parts[0] == "kd":
            parts = ["wide", *parts]
    family, rest = parts[0], parts[1:]
    taught = rest[:1] == ["kd"]
    rest = rest[1:] if taught else rest
    try:
        (sparsity,) = map(float, rest or ["0.75"])
    except ValueError:
        sparsity = -1.0
    if family not in FAMILIES or not 0 <= sparsity < 1:
        raise ValueError(
            f"configs/sparse_ift.py has no variant {arg!r}; take "
            f"{', '.join(FAMILIES)}, smoke or smoke-FAMILY, then -kd and a sparsity as "
            "in wide-kd-0.9"
        )
    return smoke, family, taught, sparsity
