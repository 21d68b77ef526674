"""Losses: arrays in, one float32 value per example (or pixel) out.

No loss reduces over the batch or carries a weight; the train step does both, once.
Arrays come first, options by keyword, and `where=` masks. Themes: `supervised` (against
labels), `logits`, `hlfd` (importance and prediction maps), `dense` (regions).
"""

from jaxkd.losses.dense import region_affinity
from jaxkd.losses.hlfd import (
    concatenated_importance_map_distillation,
    concatenated_prediction_map_distillation,
    importance_map,
    importance_map_distillation,
    prediction_map_distillation,
    prediction_map_divergence,
    project,
    unified_importance_map_distillation,
    unified_prediction_map_distillation,
)
from jaxkd.losses.logits import kd, kd_cross_entropy, softened_kl
from jaxkd.losses.supervised import (
    batch_dice,
    bce_dice,
    binary_bce,
    binary_dice,
    cross_entropy,
    dice,
    focal,
    foreground_logits,
)

__all__ = [
    "batch_dice",
    "bce_dice",
    "binary_bce",
    "binary_dice",
    "concatenated_importance_map_distillation",
    "concatenated_prediction_map_distillation",
    "cross_entropy",
    "dice",
    "focal",
    "foreground_logits",
    "importance_map",
    "importance_map_distillation",
    "kd",
    "kd_cross_entropy",
    "prediction_map_distillation",
    "prediction_map_divergence",
    "project",
    "region_affinity",
    "softened_kl",
    "unified_importance_map_distillation",
    "unified_prediction_map_distillation",
]
