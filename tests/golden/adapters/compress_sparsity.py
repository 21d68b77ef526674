"""Adapters of the vectors of masks, distributions and dynamic sparse training."""

import re

import jax
import jax.numpy as jnp
import numpy as np

from jaxkd import compression
from jaxkd.sparsity import distributions, masks, schedules

TENSOR = r"t(\d+)_(\w+)_mask_before"


def compress_erk_resnet18(v):
    results = {}
    for group in ("body", "all"):
        names = v.numpy(f"{group}_names").tolist()
        shapes = dict(zip(names, v.numpy(f"{group}_shapes_hwio").tolist(), strict=True))
        # The dense layer has two axes; the file shows it with four.
        shapes = {
            name: tuple(shape[2:] if name.startswith("fc") else shape)
            for name, shape in shapes.items()
        }
        for key in v.keys(rf"{group}_(er|erk)_[\d.]+"):
            _, kind, sparsity = key.split("_")
            found = distributions.densities(shapes, float(sparsity), distribution=kind)
            results[key] = np.array([found[name] for name in names])
            v.tolerances[key] = (1e-12, 1e-12)
    return results


def compress_gmp_schedule(v):
    step = v.numpy("step")
    # The file's notes: exchanges end at 0.75 of the steps.
    _, end = schedules.window(int(step[-1]))
    v.tolerances |= {key: (1e-9, 1e-9) for key in ("sparsity", "rigl_fraction")}
    return {
        "sparsity": schedules.cubic_sparsity(
            step,
            initial=v.numpy("s_init").item(),
            final=v.numpy("s_final").item(),
            begin=v.numpy("t_start").item(),
            end=v.numpy("t_end").item(),
        ),
        "rigl_fraction": schedules.drop_fraction(step, end=end),
    }


def compress_topk_mask(v):
    weights = v["w"]
    results = {}
    for key in v.keys(r"s[\d.]+_mask"):
        sparsity = float(key[1:].removesuffix("_mask"))
        found = np.asarray(masks.magnitude_mask(weights, sparsity))
        results[key] = _settled(found, v.numpy(key), np.abs(v.numpy("w")))
    return results


def _settled(found, expected, scores):
    """Ties at the threshold may fall either way, if the counts agree."""
    if found.sum() != expected.sum() or not found.any():
        return found
    return np.where(scores == scores[found].min(), expected, found)


def compress_rigl_update(v):
    def exchanged(t, name, sparsity, weights, mask):
        path = f"{name}/kernel"
        end = v.numpy("end_iteration").item()
        rigl = compression.create(
            "rigl",
            sparsity=sparsity,
            frequency=v.numpy("frequency").item(),
            drop_fraction=v.numpy("drop_fraction").item(),
            end=0.5,
        )
        told = compression.After(
            params={path: weights},
            gradients={path: v[f"t{t}_{name}_dense_grad"]},
            key=jax.random.key(0),
            step=jnp.int32(t - 1),
            steps_per_epoch=1,
            total_steps=2 * end,
        )
        params, state = rigl.update({}, {"masks": {path: mask}}, told)
        return params[path], rigl.masks(state)[path]

    return _exchanges(v, exchanged)


def compress_set_update(v):
    def exchanged(t, name, sparsity, weights, mask):
        fraction = _fraction(v, t)
        new = masks.exchange(
            mask,
            weights,
            v[f"t{t}_{name}_score"],
            drop=int(fraction * int(mask.sum())),
            target=int(np.float32((1 - sparsity) * mask.size)),
        )
        return jnp.where(mask, weights, 0.0), new

    return _exchanges(v, exchanged)


def _exchanges(v, exchanged):
    """All updates of a file; `exchanged` returns the new weights and mask."""
    keys = v.keys(TENSOR)
    names = sorted({re.fullmatch(TENSOR, key)[2] for key in keys})
    targets = dict(zip(names, v.numpy("target_sparsity").tolist(), strict=True))
    if len(set(targets.values())) == 1:
        assert targets[names[0]] == v.numpy("sparsity").item()
    results = {}
    for key in keys:
        t, name = re.fullmatch(TENSOR, key).groups()
        t, start = int(t), f"t{t}_{name}"
        assert t % v.numpy("frequency").item() == 0
        results[f"t{t}_drop_fraction"] = _fraction(v, t)
        v.tolerances[f"t{t}_drop_fraction"] = (1e-15, 0.0)
        weights, mask = exchanged(
            t, name, targets[name], v[f"{start}_w"], v[key].astype(bool)
        )
        # The moments before the update are not in the file: those after it must
        # survive the new mask as they are.
        moments = v[f"{start}_mom_after"]
        after = compression.apply_masks(
            {"w": weights, "mom": moments}, {"w": mask, "mom": mask}
        )
        results[f"{start}_mask_after"] = mask
        results[f"{start}_w_after"] = after["w"]
        results[f"{start}_mom_after"] = after["mom"]
    return results


def _fraction(v, t):
    return schedules.drop_fraction(
        t,
        initial=v.numpy("drop_fraction").item(),
        end=v.numpy("end_iteration").item(),
    )
