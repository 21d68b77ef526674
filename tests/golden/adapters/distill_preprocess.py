"""Adapter of HLFD's pre-processing: through real files, as a user's data goes."""

import tempfile
from pathlib import Path

import jax.numpy as jnp
import nibabel
import numpy as np

from jaxkd import data

CROP = (50, 434, 60, 444)


def distill_hlfd_preprocess(v):
    dataset = v.hp("dataset")
    ct, labels = (
        np.kron(v.numpy(key), np.ones((8, 8), v.arrays[key].dtype))
        for key in ("in_ct_64", "in_mask_64")
    )
    with tempfile.TemporaryDirectory() as folder:
        # Two equal cases, since a set is split into a training and a test part.
        for case in range(2):
            _write(Path(folder), dataset, case, ct, labels.astype(np.uint8))
        source = data.load(
            {"lits": "lits", "kits": "kits19"}[dataset],
            split="test",
            path=folder,
            target=v.hp("task"),
            slices="all",
            test_fraction=0.5,
        )
        record = source[0]
    flip, quarters = v.hp("flip"), v.hp("rot90_k")

    def augmented(image):
        turned = data.rotate_quarter(
            data.flip_image(jnp.asarray(image), *flip), quarters
        )
        return np.asarray(data.crop(turned, CROP), np.float64)

    image = augmented(record["image"])[..., 0]
    mask = augmented(np.eye(2, dtype=np.float32)[record["label"]])
    return {
        "out_loss": image.mean(),
        "out_image_sub": image[::4, ::4],
        "out_mask_sub": mask[::4, ::4],
        "out_image_sum": image.sum(),
        "out_mask_fg": mask[..., 1].sum(),
    }


def _write(folder, dataset, case, ct, labels):
    """One slice in the layout of a data set; they differ in the axis of slices."""
    if dataset == "kits":
        place, axis = folder / f"case_{case:05d}", 0
        paths = place / "imaging.nii.gz", place / "segmentation.nii.gz"
        place.mkdir()
    else:
        axis = 2
        paths = folder / f"volume-{case}.nii", folder / f"segmentation-{case}.nii"
    for path, plane in zip(paths, (ct, labels), strict=True):
        volume = np.expand_dims(plane, axis)
        nibabel.Nifti1Image(volume, np.eye(4)).to_filename(path)
