"""Pairs of feature maps that must lie on one grid, checked before any array exists."""

from __future__ import annotations

from jaxkd.distill.checks import feature_map
from jaxkd.distill.method import Specs


def same_grid(specs: Specs, student_tap: str, teacher_tap: str) -> tuple[int, int]:
    """Checks that two maps have equally many pixels in each direction.

    Args:
      specs: the networks.
      student_tap: a map of the student.
      teacher_tap: a map of the first teacher.

    Returns:
      The channels of the student's map and of the teacher's.

    Raises:
      KeyError: a network lacks its tap.
      ValueError: a tap is no map, or the sizes differ.
    """
    student, teacher = specs.student, specs.teacher
    *size_s, channels_s = feature_map(student, student_tap)
    *size_t, channels_t = feature_map(teacher, teacher_tap)
    if size_s != size_t:
        raise ValueError(
            f"tap {student_tap!r} of student {student.name!r} is "
            f"{size_s[0]}x{size_s[1]} and tap {teacher_tap!r} of teacher "
            f"{teacher.name!r} is {size_t[0]}x{size_t[1]}; set student_tap and "
            f"teacher_tap to maps of one size"
        )
    return channels_s, channels_t
