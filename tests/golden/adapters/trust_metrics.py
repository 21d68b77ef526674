"""Adapters of the vectors of evaluation metrics."""

import numpy as np

from jaxkd import metrics

SKIPPED = {
    "trust_seg_metrics": {
        "empty_dice_both_empty_medpy": "nan; two empty masks agree here, Dice is 1",
        "empty_dice_both_empty_monai": "nan; two empty masks agree here, Dice is 1",
        "empty_dice_ref_empty_monai": "nan; a false alarm has Dice 0 here",
        "empty_hd95_pred_empty_medpy": "an error there, nan here",
        "empty_ravd_ref_empty_medpy": "an error there, nan here",
    }
}


def trust_seg_metrics(v):
    pred, ref = v.numpy("pred"), v.numpy("ref")
    spacing = v.numpy("spacing")
    confusion = metrics.confusion_matrix(
        v.numpy("multi_ref"),
        v.numpy("multi_pred"),
        num_classes=len(v.arrays["confusion"]),
    )
    empty = np.zeros_like(ref)
    results = {
        "confusion": confusion,
        "iou": metrics.class_iou(confusion),
        "miou": metrics.mean_iou(confusion),
        "pixel_acc": np.trace(confusion) / confusion.sum(),
        "dice": metrics.dice(pred, ref),
        "jaccard": metrics.iou(pred, ref),
        "precision": metrics.precision(pred, ref),
        "recall": metrics.recall(pred, ref),
        "ravd": metrics.ravd(pred, ref),
        "hd": metrics.hausdorff(pred, ref),
        "hd_spacing": metrics.hausdorff(pred, ref, spacing=spacing),
        "hd_monai": metrics.hausdorff(pred, ref),
        "hd95_medpy": metrics.hd95(pred, ref),
        "hd95_medpy_spacing": metrics.hd95(pred, ref, spacing=spacing),
        "hd95_monai": metrics.hd95(pred, ref, pooling="max"),
        "hd95_monai_spacing": metrics.hd95(pred, ref, spacing=spacing, pooling="max"),
        "assd": metrics.assd(pred, ref),
        "assd_spacing": metrics.assd(pred, ref, spacing=spacing),
        "assd_monai": metrics.assd(pred, ref),
        "asd_medpy": metrics.asd(pred, ref),
        "asd_monai": metrics.asd(pred, ref),
        "empty_dice_pred_empty_medpy": metrics.dice(empty, ref),
        "empty_dice_pred_empty_monai": metrics.dice(empty, ref),
        "empty_dice_ref_empty_medpy": metrics.dice(pred, empty),
        "empty_dice_ref_empty_monai_noignore": metrics.dice(pred, empty),
        "empty_dice_both_empty_monai_noignore": metrics.dice(empty, empty),
        "empty_jaccard_both_empty_medpy": metrics.iou(empty, empty),
        "empty_ravd_pred_empty_medpy": metrics.ravd(empty, ref),
        "empty_hd95_both_empty_monai": metrics.hd95(empty, empty),
        "empty_hd95_pred_empty_monai": metrics.hd95(empty, ref),
        "empty_hd95_ref_empty_monai": metrics.hd95(pred, empty),
    }
    # That library computes in float32.
    v.tolerances |= {key: (1e-5, 1e-5) for key in results if "monai" in key}
    return results
