"""Data: sources, pipelines, augmentation, and a small real sample.

`load` opens a source by name, `train_batches` and `eval_batches` turn it into numpy
batches, and `Augmentation` prepares these on the device, inside the step. Packages that
only some sources need are imported when such a source is opened.
"""

from jaxkd.data.augment import Augmentation, crop, flip_image, rotate_quarter
from jaxkd.data.crops import crop_and_flip, draw_crops
from jaxkd.data.pipeline import TrainBatches, eval_batches, train_batches
from jaxkd.data.region_answers import store_regions
from jaxkd.data.regions import (
    Regions,
    RegionSource,
    choose_regions,
    read_regions,
    with_regions,
    write_regions,
)
from jaxkd.data.registry import load, names, register
from jaxkd.data.source import DamagedFileError, Source, SourceInfo
from jaxkd.data.split import check_disjoint, fold_by_group, split_by_group

__all__ = [
    "Augmentation",
    "DamagedFileError",
    "RegionSource",
    "Regions",
    "Source",
    "SourceInfo",
    "TrainBatches",
    "check_disjoint",
    "choose_regions",
    "crop",
    "crop_and_flip",
    "draw_crops",
    "eval_batches",
    "flip_image",
    "fold_by_group",
    "load",
    "names",
    "read_regions",
    "register",
    "rotate_quarter",
    "split_by_group",
    "store_regions",
    "train_batches",
    "with_regions",
    "write_regions",
]
