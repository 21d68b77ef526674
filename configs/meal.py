"""MEAL V2 and MEAL: an ensemble taught to one student, without labels.

Commands:
    python -m jaxkd.main --config=configs/meal.py --workdir=runs/meal
    python -m jaxkd.main --config=configs/meal.py:v1 --workdir=runs/meal-v1
    python -m jaxkd.main --config=configs/meal.py:cifar100 \
        --config.data.path=data/cifar-100-python --workdir=runs/meal-cifar

Two teachers and the student are trained with the labels first. The student then goes
on without them (weight decay 0, a small rate with one drop), matching the teachers'
averaged probabilities.

Variants:
    v2         MEAL V2 on digits, the default: the discriminator trained by the stage's
        optimiser, as the authors' code effectively does.
    v2-own     the discriminator with its own optimiser and rate, and its gradient
        reversed into the student: an adversary.
    v1         MEAL: losses and discriminators at every stage, one teacher a step; by
        the schedule of V2, not by that of its paper.
    smoke      v2 for a few seconds.
    cifar100   v2 with ResNet-34 and WRN-40-2 as teachers of ResNet-18.

Expected: see docs/methods/meal_v2.md.
"""

import shared
from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    kind = shared.variant(arg, "meal.py", "v2", "v2-own", "v1", "smoke", "cifar100")
    data = kind if kind in ("smoke", "cifar100") else "digits"
    config, optimizer, epochs = shared.classification(data, epochs=8)
    config.networks = dict(
        teacher1=dict(name="resnet20", width_factor=0.5),
        teacher2=dict(name="resnet14", width_factor=0.5),
        student_alone=dict(name="resnet8", width_factor=0.25),
        student=dict(name="resnet8", width_factor=0.25),
    )
    if kind == "cifar100":
        config.networks = dict(
            teacher1=dict(name="resnet34", stem="cifar"),
            teacher2=dict(name="wrn_40_2"),
            student_alone=dict(name="resnet18", stem="cifar"),
            student=dict(name="resnet18", stem="cifar"),
        )
    method = dict(meal_v2=dict())
    if kind == "v2-own":
        method = dict(meal_v2=dict(adversarial="grl", discriminator_learning_rate=1e-4))
    if kind == "v1":
        method = dict(meal=dict())
    first = dict(method=shared.CE, optimizer=optimizer, epochs=epochs)
    later = dict(optimizer)
    later.pop("milestones", None)
    later.update(
        learning_rate=optimizer["learning_rate"] / 10,
        schedule="multistep" if epochs > 1 else "constant",
        weight_decay=0.0,
        warmup_epochs=0.0,
    )
    if epochs > 1:
        later.update(milestones=(epochs * 5 // 9,), factor=0.1)
    return shared.stages(
        config,
        teacher1=first,
        teacher2=first,
        student_alone=first,
        student=dict(
            method=method,
            teachers=("teacher1", "teacher2"),
            start_from="student_alone",
            optimizer=later,
            epochs=epochs,
        ),
    )
