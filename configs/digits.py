"""Any method on scikit-learn's digits: a toy set, to try things in seconds.

Commands:
    python -m jaxkd.main --config=configs/digits.py:dkd --workdir=runs/digits-dkd
    python -m jaxkd.main --config=configs/digits.py:dml --workdir=runs/digits-dml

Variants: the keys of `RECIPES` in configs/shared.py (default `kd`), and `smoke`.
Loss weights are those for CIFAR-100; nothing is tuned.

Time: half a minute on two CPU cores. Expected: see docs/methods/table.md.
"""

import shared
from ml_collections import ConfigDict

# Equal widths, which FSP needs; the teacher is deeper.
TEACHER = dict(name="resnet20", width_factor=0.5)
STUDENT = dict(name="resnet8", width_factor=0.5)
EPOCHS = 12


def get_config(arg: str = "kd") -> ConfigDict:
    smoke = arg == "smoke"
    epochs = 1 if smoke else EPOCHS
    config = shared.base()
    config.notes = ("Handwritten digits of 8x8 pixels: a toy set, for trying things.",)
    config.data = shared.digits()
    return shared.pair(
        config,
        "kd" if smoke else arg or "kd",
        teacher=TEACHER,
        student=STUDENT,
        optimizer=shared.digits_optimizer(epochs),
        epochs=epochs,
        first=2,
    )
