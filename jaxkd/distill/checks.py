"""What methods check of the networks they are given, before any array exists."""

from __future__ import annotations

from jaxkd.layers import NetworkSpec


def check_same_logits(student: NetworkSpec, teacher: NetworkSpec) -> None:
    """Checks that two networks answer the same question at the same resolution.

    Raises:
      ValueError: they have other classes, or maps of other sizes.
    """
    if student.num_classes != teacher.num_classes:
        raise ValueError(
            f"teacher logits have {teacher.num_classes} classes and student logits "
            f"{student.num_classes}; give networks {teacher.name!r} and "
            f"{student.name!r} the same num_classes"
        )
    if student.logits != teacher.logits:
        raise ValueError(
            f"teacher {teacher.name!r} has logits of shape {teacher.logits} and "
            f"student {student.name!r} {student.logits}; they must be equal"
        )


def check_segmentation(method: str, student: NetworkSpec) -> None:
    """Checks that a network labels pixels, with a background class.

    Raises:
      ValueError: it gives one label per image, or has fewer than two classes.
    """
    if len(student.logits) != 3 or student.num_classes < 2:
        raise ValueError(
            f"method {method!r} needs logits [height, width, classes >= 2]; network "
            f"{student.name!r} has {student.logits}"
        )


def feature_map(network: NetworkSpec, tap: str) -> tuple[int, int, int]:
    """The shape `(height, width, channels)` of a tap that must be a map.

    Raises:
      KeyError: the network has no such tap.
      ValueError: the tap is no map.
    """
    shape = network.tap(tap)
    if len(shape) != 3:
        raise ValueError(
            f"tap {tap!r} of network {network.name!r} has shape {shape}; this method "
            f"needs maps [height, width, channels]"
        )
    return shape[0], shape[1], shape[2]
