"""How far a student is from its teacher, example by example, on the host.

Every function takes the logits of both, `[examples, classes]`, computes in float64 and
returns one value per example. The divergence and the distances are zero for equal
logits; `top_k_agreement` is one where both name the same class.

Reference: Beyer et al., "Knowledge Distillation: A Good Teacher Is Patient and
Consistent", CVPR 2022, whose evaluator these distances are.
"""

from __future__ import annotations

import numpy as np
from scipy.special import log_softmax

from jaxkd.metrics.classification import true_class_rank

# Keeps the square root of the published distances away from zero.
_FLOOR = 1e-12


def kl_divergence(
    student: np.ndarray, teacher: np.ndarray, *, temperature: float = 1.0
) -> np.ndarray:
    """`T^2 * KL(softmax(teacher / T) || softmax(student / T))`.

    Args:
      student: logits `[examples, classes]`.
      teacher: logits of the same shape.
      temperature: softens both.

    Returns:
      float64 `[examples]`.

    Raises:
      ValueError: shapes differ, or `temperature` is not positive.

    >>> kl_divergence(np.zeros((1, 2)), np.log([[0.75, 0.25]])).round(4).tolist()
    [0.1308]
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    student, teacher = _checked(student, teacher)
    log_p = log_softmax(student / temperature, axis=1)
    log_q = log_softmax(teacher / temperature, axis=1)
    return temperature**2 * np.sum(np.exp(log_q) * (log_q - log_p), axis=1)


def euclidean_distance(student: np.ndarray, teacher: np.ndarray) -> np.ndarray:
    """`sqrt(sum_k (student - teacher)^2 + 1e-12)`; see `kl_divergence` for the rest."""
    return np.sqrt(squared_distance(student, teacher) + _FLOOR)


def squared_distance(student: np.ndarray, teacher: np.ndarray) -> np.ndarray:
    """`sum_k (student - teacher)^2`; see `kl_divergence` for the rest."""
    student, teacher = _checked(student, teacher)
    return np.sum(np.square(student - teacher), axis=1)


def log_probability_distance(student: np.ndarray, teacher: np.ndarray) -> np.ndarray:
    """`euclidean_distance` of the log-softmaxes; see `kl_divergence` for the rest."""
    student, teacher = _checked(student, teacher)
    return euclidean_distance(
        log_softmax(student, axis=1), log_softmax(teacher, axis=1)
    )


def hard_divergence(student: np.ndarray, teacher: np.ndarray) -> np.ndarray:
    """Divergence from the teacher's decision: `-log softmax(student)[argmax teacher]`.

    See `kl_divergence` for arguments, result and errors.
    """
    student, teacher = _checked(student, teacher)
    decision = np.argmax(teacher, axis=1)[:, None]
    return -np.take_along_axis(log_softmax(student, axis=1), decision, axis=1)[:, 0]


def top_k_agreement(
    student: np.ndarray, teacher: np.ndarray, *, k: int = 1
) -> np.ndarray:
    """Whether the teacher's first class is among the student's first `k`.

    Classes of equal score are ordered by index.

    Args:
      student: logits `[examples, classes]`.
      teacher: logits of the same shape.
      k: how many classes of the student count.

    Returns:
      float64 `[examples]`, 0 or 1.

    Raises:
      ValueError: shapes differ, or `k` < 1.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    student, teacher = _checked(student, teacher)
    return (true_class_rank(student, np.argmax(teacher, axis=1)) < k).astype(np.float64)


def _checked(student: np.ndarray, teacher: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    student = np.asarray(student, np.float64)
    teacher = np.asarray(teacher, np.float64)
    if student.ndim != 2 or student.shape != teacher.shape:
        raise ValueError(
            "logits of student and teacher must be [examples, classes] and of one "
            f"shape, got {student.shape} and {teacher.shape}"
        )
    return student, teacher
