"""Losses: arrays in, one float32 value per example (or pixel) out.

No loss reduces over the batch or carries a weight; the train step does both, once.
Arrays come first, options by keyword, and `where=` masks. Themes: against labels
(`supervised`); of logits (`logits`, `decoupled`, `correlation`, `standardize`,
`multi_level`, `multi_teacher`); of a network with itself and its peers
(`self_distillation`, `soft_labels`); of feature maps (`features`, `attention`, `flow`,
`factor`, `activation`, `review`, `svd`, `head_network`, `hlfd`); of relations between
examples (`relations`, `contrastive`); of dense predictions (`dense`, `channelwise`,
`structure`, `class_variation`, `cross_image`, `multi_granularity`); of critics
(`adversarial`, `wasserstein`).
"""

from jaxkd.losses.activation import ab, ofd, ofd_margin
from jaxkd.losses.adversarial import (
    discriminate,
    discriminator_loss,
    meal_similarity,
    reverse_gradient,
)
from jaxkd.losses.attention import (
    attention_map,
    attention_transfer,
    neuron_selectivity_transfer,
)
from jaxkd.losses.channelwise import cwd
from jaxkd.losses.class_variation import ifvd
from jaxkd.losses.contrastive import (
    crd,
    crd_in_batch,
    crd_normalizers,
    update_bank,
)
from jaxkd.losses.correlation import dist, dist_inter, dist_intra
from jaxkd.losses.cross_image import cirkd_memory, cirkd_minibatch
from jaxkd.losses.decoupled import (
    dkd,
    dkd_nontarget,
    dkd_target,
    nkd,
    nkd_nontarget,
    nkd_target,
)
from jaxkd.losses.dense import region_affinity
from jaxkd.losses.factor import ft
from jaxkd.losses.features import hint, reconstruction, softmax_regression, vid
from jaxkd.losses.flow import flow_matrix, fsp
from jaxkd.losses.head_network import squared_error_sum
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
from jaxkd.losses.logits import (
    hard_distillation,
    kd,
    kd_cross_entropy,
    softened_kl,
    wsld,
)
from jaxkd.losses.multi_granularity import (
    content_consistency,
    labelled_cross_entropy,
    semantic_consistency,
)
from jaxkd.losses.multi_level import (
    batch_correlation,
    class_correlation,
    low_confidence,
    low_confidence_classes,
)
from jaxkd.losses.multi_teacher import (
    averaged_kd,
    averaged_logits,
    averaged_probabilities,
    camkd,
    confidence_weights,
    ebkd,
    entropy_weights,
    function_matching,
    weighted_hint,
)
from jaxkd.losses.relations import cc, cc_rbf, pkt, rkd_angle, rkd_distance, sp
from jaxkd.losses.review import hierarchical_context
from jaxkd.losses.self_distillation import (
    byot_feature,
    dml,
    pskd,
    pskd_targets,
    tfkd_regularization,
    tfkd_self,
    uskd_nontarget,
    uskd_target,
    uskd_weak,
)
from jaxkd.losses.soft_labels import (
    mean_logits,
    mean_probabilities,
    soft_cross_entropy,
)
from jaxkd.losses.standardize import standardize_logits
from jaxkd.losses.structure import skd_pair, skd_pixel
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
from jaxkd.losses.svd import kdsvd
from jaxkd.losses.wasserstein import gradient_penalty

__all__ = [
    "ab",
    "attention_map",
    "attention_transfer",
    "averaged_kd",
    "averaged_logits",
    "averaged_probabilities",
    "batch_correlation",
    "batch_dice",
    "bce_dice",
    "binary_bce",
    "binary_dice",
    "byot_feature",
    "camkd",
    "cc",
    "cc_rbf",
    "cirkd_memory",
    "cirkd_minibatch",
    "class_correlation",
    "concatenated_importance_map_distillation",
    "concatenated_prediction_map_distillation",
    "confidence_weights",
    "content_consistency",
    "crd",
    "crd_in_batch",
    "crd_normalizers",
    "cross_entropy",
    "cwd",
    "dice",
    "discriminate",
    "discriminator_loss",
    "dist",
    "dist_inter",
    "dist_intra",
    "dkd",
    "dkd_nontarget",
    "dkd_target",
    "dml",
    "ebkd",
    "entropy_weights",
    "flow_matrix",
    "focal",
    "foreground_logits",
    "fsp",
    "ft",
    "function_matching",
    "gradient_penalty",
    "hard_distillation",
    "hierarchical_context",
    "hint",
    "ifvd",
    "importance_map",
    "importance_map_distillation",
    "kd",
    "kd_cross_entropy",
    "kdsvd",
    "labelled_cross_entropy",
    "low_confidence",
    "low_confidence_classes",
    "meal_similarity",
    "mean_logits",
    "mean_probabilities",
    "neuron_selectivity_transfer",
    "nkd",
    "nkd_nontarget",
    "nkd_target",
    "ofd",
    "ofd_margin",
    "pkt",
    "prediction_map_distillation",
    "prediction_map_divergence",
    "project",
    "pskd",
    "pskd_targets",
    "reconstruction",
    "region_affinity",
    "reverse_gradient",
    "rkd_angle",
    "rkd_distance",
    "semantic_consistency",
    "skd_pair",
    "skd_pixel",
    "soft_cross_entropy",
    "softened_kl",
    "softmax_regression",
    "sp",
    "squared_error_sum",
    "standardize_logits",
    "tfkd_regularization",
    "tfkd_self",
    "unified_importance_map_distillation",
    "unified_prediction_map_distillation",
    "update_bank",
    "uskd_nontarget",
    "uskd_target",
    "uskd_weak",
    "vid",
    "weighted_hint",
    "wsld",
]
