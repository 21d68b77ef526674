"""Cross-image relational distillation for segmentation (CIRKD)."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxkd import losses
from jaxkd.distill.checks import check_segmentation
from jaxkd.distill.class_queues import (
    enqueue,
    make_queue,
    pixel_items,
    region_items,
    sample_queue,
)
from jaxkd.distill.map_pairs import same_grid
from jaxkd.distill.method import (
    Inputs,
    Memory,
    Method,
    Params,
    Scheduled,
    Specs,
    Terms,
    Weight,
)
from jaxkd.distill.modules import apply_module, init_module
from jaxkd.distill.registry import register
from jaxkd.layers import BatchNorm, fan_in_uniform
from jaxkd.layers.blocks import Maps, NewMaps
from jaxkd.layers.convolution import Conv
from jaxkd.losses.checks import check_positive
from jaxkd.numerics import adaptive_average_pool, l2_normalize, resize_nearest

# The code averages over 4x4 pixels before it compares pairs of images this large.
_LARGE, _POOL = 256, 4


class PixelProjector(nn.Module):
    """1x1 convolution, batch norm, ReLU, 1x1 convolution; no biases.

    Attributes:
      features: channels of the teacher.
    """

    features: int

    @nn.compact
    def __call__(self, x: Maps, train: bool) -> NewMaps:
        """Maps `[b, h, w, c]` to `[b, h, w, features]`."""

        def conv(x: jax.Array, name: str) -> jax.Array:
            return Conv(
                self.features,
                (1, 1),
                use_bias=False,
                kernel_init=fan_in_uniform,
                dtype=x.dtype,
                name=name,
            )(x)

        x = BatchNorm(dtype=x.dtype, name="norm")(conv(x, "conv0"), train)
        return conv(nn.relu(x), "conv1")


@register()
def cirkd(
    *,
    alpha: Weight = 1.0,
    beta: Weight = 0.1,
    gamma: Weight = 0.1,
    temperature: Scheduled = 0.1,
    memory_temperature: Scheduled = 1.0,
    pool: int | None = None,
    pixel_memory: int = 20000,
    region_memory: int = 2000,
    pixel_contrast: int = 4096,
    region_contrast: int = 1024,
    pixels_per_class: int = 16,
    ignore_index: int = 255,
    student_tap: str = "e5",
    teacher_tap: str = "e5",
) -> Method:
    """Similarities of pixels to those of other images (Yang et al., 2022).

    Each pixel of the student should be as similar as the teacher's pixel is

        minibatch:      to every pixel of every image of the batch      (weight alpha)
        memory_pixel:   to pixel embeddings of earlier batches          (weight beta)
        memory_region:  to class embeddings of earlier images           (weight gamma)

    as divergences of softmaxes over similarities / temperature, without `T^2` in the
    first term. Pixel-wise distillation is a part of the published recipe and added by
    `weighted({"ce": 1.0, "kd": 1.0, "cirkd": 1.0}, kd={"temperature": 1.0})`.

    Needs: a semantic feature map of each network, of one size; channels may differ. A
    projector (1x1 convolution, batch norm, ReLU, 1x1 convolution) is trained along for
    the memory terms. The memory holds queues of the teacher's embeddings per class:
    `pixel_memory` pixels, of which each image gives `pixels_per_class`, and
    `region_memory` means over a class. Labels are resized to the maps by copying
    pixels.

    Cost: time and memory of the mini-batch term grow with the square of the pixels of
    the maps, and time also with that of the batch of all devices together: use maps of
    stride 8 or 16, not of full resolution. With 19 classes and 256 channels the queues
    take 0.4 GB.

    Pitfalls: the queues start with random vectors, as in the code. Classes weigh alike
    among the contrasts, however rare.

    Paper and code: as the code, one draw of places is shared by all classes and there
    are `contrast // classes + 1` per class. Where the code reaches the end of a queue,
    it overwrites the last places and starts again; here queues are rings.

    Args:
      alpha: weight of `minibatch`; a number or a schedule.
      beta: weight of `memory_pixel`.
      gamma: weight of `memory_region`.
      temperature: of the similarities, in all terms; a number or a schedule.
      memory_temperature: softens the distributions of the memory terms further.
      pool: average pooling of the maps before the mini-batch term, as a divisor of
        their sides; None takes 4 where both sides are at least 256, else 1.
      pixel_memory: length of each class's queue of pixels.
      region_memory: length of each class's queue of regions.
      pixel_contrast: about how many pixels each pixel is compared with, in all.
      region_contrast: about how many regions.
      pixels_per_class: pixels that enter a queue, per class and image.
      ignore_index: label of pixels that take no part in the memory terms.
      student_tap: a feature map of the student.
      teacher_tap: a feature map of the teacher.

    Raises:
      ValueError: a temperature or a size is not positive.

    Reference:
      Yang et al., "Cross-Image Relational Knowledge Distillation for Semantic
      Segmentation", CVPR 2022.
    """
    check_positive("temperature", temperature)
    check_positive("memory_temperature", memory_temperature)
    sizes = {
        "pool": 1 if pool is None else pool,
        "pixel_memory": pixel_memory,
        "region_memory": region_memory,
        "pixel_contrast": pixel_contrast,
        "region_contrast": region_contrast,
        "pixels_per_class": pixels_per_class,
    }
    for name, value in sizes.items():
        check_positive(name, value)

    def init(key: jax.Array, specs: Specs) -> tuple[Params, Memory]:
        student = specs.student
        check_segmentation("cirkd", student)
        _, channels = same_grid(specs, student_tap, teacher_tap)
        classes, batch = student.num_classes, specs.data.batch_size
        _check_queue("pixel", pixel_memory, batch * pixels_per_class, pixel_contrast,
                     classes)  # fmt: skip
        _check_queue("region", region_memory, batch, region_contrast, classes)
        projector_key, pixel_key, region_key = jax.random.split(key, 3)
        module = PixelProjector(channels)
        params, stats = init_module(module, projector_key, student.tap(student_tap))
        memory = {
            "projector": stats,
            "pixels": make_queue(pixel_key, classes, pixel_memory, channels),
            "regions": make_queue(region_key, classes, region_memory, channels),
        }
        return {"projector": params}, memory

    def terms(params: Params, memory: Memory, inputs: Inputs) -> tuple[Terms, Memory]:
        student = inputs.student.taps[student_tap]
        teacher = jax.lax.stop_gradient(inputs.teacher.taps[teacher_tap])
        classes, channels = inputs.student.logits.shape[-1], teacher.shape[-1]
        labels = resize_nearest(inputs.labels[..., None], teacher.shape[1:3])[..., 0]
        labelled = labels != ignore_index
        embedded, stats = apply_module(
            PixelProjector(channels),
            params["projector"],
            memory["projector"],
            student,
            train=True,
        )
        keys = jax.random.split(inputs.key, 3)
        batch = teacher.shape[0]
        unit = l2_normalize(teacher.astype(jnp.float32)).reshape(batch, -1, channels)
        # An ignored label that is also a class number must not enter its queue.
        flat = jnp.where(labelled, labels, -1).reshape(batch, -1)
        pixels = enqueue(
            memory["pixels"],
            *pixel_items(unit, flat, keys[0], classes, pixels_per_class),
        )
        regions = enqueue(memory["regions"], *region_items(unit, flat, classes))

        def compare(queue: dict[str, jax.Array], key: jax.Array, contrast: int):
            values = losses.cirkd_memory(
                embedded,
                teacher,
                sample_queue(queue, key, contrast // classes + 1),
                contrast_temperature=inputs.at(temperature),
                temperature=inputs.at(memory_temperature),
                where=labelled,
            )
            # So that the mean over all pixels is that over the labelled ones.
            return values * (labels.size / jnp.maximum(jnp.sum(labelled), 1))

        values = {
            "minibatch": losses.cirkd_minibatch(
                pooled(student, pool),
                pooled(teacher, pool),
                temperature=inputs.at(temperature),
            ),
            "memory_pixel": compare(pixels, keys[1], pixel_contrast),
            "memory_region": compare(regions, keys[2], region_contrast),
        }
        return values, {"projector": stats, "pixels": pixels, "regions": regions}

    weights = {"minibatch": alpha, "memory_pixel": beta, "memory_region": gamma}
    return Method(init=init, terms=terms, weights=weights, num_teachers=1)


def pooled(x: jax.Array, pool: int | None) -> jax.Array:
    """The maps of the mini-batch term, see the option `pool` of `cirkd`."""
    height, width = x.shape[1:3]
    if pool is None:
        pool = _POOL if min(height, width) >= _LARGE else 1
    return adaptive_average_pool(x, (-(-height // pool), -(-width // pool)))


def _check_queue(what: str, length: int, new: int, contrast: int, classes: int) -> None:
    """Checks that a queue holds what one step writes to it and reads from it."""
    read = contrast // classes + 1
    if length < max(new, read):
        raise ValueError(
            f"{what}_memory is {length}, but a step writes up to {new} entries per "
            f"class and reads {read}; make it at least {max(new, read)}"
        )
