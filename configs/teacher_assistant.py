"""Teacher-assistant chains: a large network teaches a middle one, that a small one.

Commands:
    python -m jaxkd.main --config=configs/teacher_assistant.py --workdir=runs/chain
    python -m jaxkd.main --config=configs/teacher_assistant.py:cifar100 \
        --config.data.path=data/cifar-100-python --workdir=runs/chain-cifar

The run trains the student four times: alone, taught by the large network, by the
assistant, and by the end of a chain of two assistants (Mirzadeh et al., "Improved
Knowledge Distillation via Teacher Assistant", AAAI 2020).

Variants: `digits` (default), `smoke`, `cifar100` (ResNet-110, 56, 32, 8).
"""

import shared
from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    kind = shared.variant(arg, "teacher_assistant.py", "digits", "smoke", "cifar100")
    config, optimizer, epochs = shared.classification(kind, epochs=10)
    depths = (110, 56, 32, 8) if kind == "cifar100" else (32, 20, 14, 8)
    factor = 1.0 if kind == "cifar100" else 0.5
    networks = [dict(name=f"resnet{d}", width_factor=factor) for d in depths]
    students = ("student_alone", "student_direct", "student_one", "student")
    config.networks = dict(
        teacher=networks[0],
        assistant1=networks[1],
        assistant2=networks[2],
        **{name: dict(networks[3]) for name in students},
    )

    def stage(*teachers: str) -> dict:
        method = shared.recipe("kd" if teachers else "none")
        common = dict(optimizer=optimizer, epochs=epochs)
        return dict(method=method, teachers=teachers, **common)

    return shared.stages(
        config,
        teacher=stage(),
        assistant1=stage("teacher"),
        assistant2=stage("assistant1"),
        student_alone=stage(),
        student_direct=stage("teacher"),
        student_one=stage("assistant1"),
        student=stage("assistant2"),
    )
