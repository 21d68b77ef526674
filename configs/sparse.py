"""Sparse networks: dynamic sparse training and pruning, with and without a teacher.

Commands:
    python -m jaxkd.main --config=configs/sparse.py --workdir=runs/sparse
    python -m jaxkd.main --config=configs/sparse.py:smoke --workdir=runs/sparse-smoke
    python -m jaxkd.main --config=configs/sparse.py:rigl \
        --config.data.path=data/cifar-100-python --workdir=runs/rigl
    python -m jaxkd.main --config=configs/sparse.py:rigl-kd \
        --config.data.path=data/cifar-100-python --workdir=runs/rigl-kd \
        --config.networks.student.compress.rigl.sparsity=0.95

Variants:
    digits   a small ResNet on scikit-learn's 8x8 digits, dense and by every method
        below at sparsity 0.9; the default.
    smoke    RigL taught by the dense network, on digits, for a few seconds.
    static, set, rigl, granet, gmp   a ResNet-18 on CIFAR-100, dense and sparse
        (`config.data.path` names the folder of the python pickles).
    static-kd, set-kd, ...   the sparse network alone, and taught by the dense one.

Recipe for CIFAR-100, that of Sparse-IFT's code: SGD with Nesterov momentum 0.9, batch
128, 200 epochs, learning rate 0.1, times 0.2 after epochs 60, 120 and 160, weight decay
5e-4 on all parameters; crop with padding 4 and flip. Masks change every 100 steps
during the first three quarters.

Hardware and time: `digits` a few minutes on a CPU; CIFAR-100 one GPU, hours, and has
not been trained in full yet. Masks are simulated: sparse networks train no faster.
"""

import shared
from ml_collections import ConfigDict

METHODS = ("static", "set", "rigl", "granet", "gmp")


def get_config(arg: str = "") -> ConfigDict:
    known = (*METHODS, *(f"{name}-kd" for name in METHODS))
    variant = shared.variant(arg, "sparse.py", "digits", "smoke", *known)
    if variant == "digits":
        return _every_method()
    if variant == "smoke":
        return _smoke()
    method, _, taught = variant.partition("-")
    return _cifar100(method, taught=bool(taught))


def _compress(method: str, **options) -> dict:
    """The network option `compress` at sparsity 0.9; masks change at `frequency`."""
    if method == "static":
        options.pop("frequency", None)
    return {method: dict(sparsity=0.9, **options)}


def _every_method() -> ConfigDict:
    config, optimizer, epochs = shared.classification("digits", epochs=12)
    network = dict(name="resnet8", width_factor=0.5)
    config.networks = {
        "dense": network,
        **{m: dict(network, compress=_compress(m, frequency=10)) for m in METHODS},
    }
    common = dict(method=dict(shared.CE), optimizer=optimizer, epochs=epochs)
    return shared.stages(config, **{name: common for name in ("dense", *METHODS)})


def _smoke() -> ConfigDict:
    config, optimizer, epochs = shared.classification("smoke", epochs=1)
    network = dict(name="resnet8", width_factor=0.25)
    return shared.pair(
        config,
        "kd",
        teacher=network,
        student=dict(network, compress=_compress("rigl", frequency=4)),
        optimizer=optimizer,
        epochs=epochs,
        first=1,
    )


def _cifar100(method: str, *, taught: bool) -> ConfigDict:
    config = shared.base(log_every=100, evaluate_every=10)
    config.data = shared.cifar100(128)
    optimizer = dict(
        name="sgd",
        learning_rate=0.1,
        schedule="multistep",
        milestones=(60, 120, 160),
        factor=0.2,
        momentum=0.9,
        nesterov=True,
        weight_decay=5e-4,
    )
    network = dict(name="resnet18", stem="cifar")
    sparse = dict(network, compress=_compress(method))
    if taught:
        return shared.pair(
            config,
            "kd",
            teacher=network,
            student=sparse,
            optimizer=optimizer,
            epochs=200,
            first=1,
        )
    config.networks = dict(dense=network, sparse=sparse)
    common = dict(method=dict(shared.CE), optimizer=optimizer, epochs=200)
    return shared.stages(config, dense=common, sparse=common)
