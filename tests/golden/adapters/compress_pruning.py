"""Adapters of the vectors of pruning: soft masks and learned thresholds."""

import re

import jax
import jax.numpy as jnp

from jaxkd.sparsity import lapp, pdp


def compress_pdp(v):
    # Of the division by the temperature in float32.
    loose = {"mask": 1e-3, "y": 1e-3, "dw": 1e-2}
    kernel, dy = v["w"], v["dy"]
    results = {}
    for key in v.keys(r"r.*_tau.*_t"):
        start = key.removesuffix("_t")
        ratio, temperature = map(float, re.fullmatch(r"r(.*)_tau(.*)", start).groups())
        limit = pdp.threshold(jnp.abs(kernel).reshape(-1), ratio)

        def soft(w, limit=limit, temperature=temperature):
            limits = jnp.broadcast_to(limit, w.shape)
            return pdp.soft_mask(jnp.square(w), limits, temperature=temperature)

        y, back = jax.vjp(lambda w, soft=soft: soft(w) * w, kernel)
        # The function knows no masks at ratio 0, where the file has a threshold too.
        hard = jnp.abs(kernel) >= limit
        if ratio > 0:
            hard = pdp.hard_masks({"w": kernel}, {"w": ratio})["w"]
        results |= {
            key: limit, f"{start}_mask": soft(kernel), f"{start}_y": y,
            f"{start}_dw": back(dy)[0], f"{start}_hard": hard,
        }  # fmt: skip
        for name, atol in loose.items():
            v.tolerances[f"{start}_{name}"] = (1e-3, atol)
    for key in v.keys(r"nm\d+of\d+_mask"):
        n, m = map(int, re.findall(r"\d+", key))
        limits = pdp.group_threshold(kernel, n=n, m=m)
        results[key] = pdp.soft_mask(jnp.square(kernel), limits)
        v.tolerances[key] = (1e-3, 1e-3)
    norms = pdp.channel_norms(kernel)
    (key,) = v.keys(r"channel_mask_tau.*")
    limit = pdp.threshold(norms, 0.5)
    results |= {"channel_norm": norms, "channel_t": limit}
    results[key] = pdp.soft_mask(
        jnp.square(norms),
        jnp.broadcast_to(limit, norms.shape),
        temperature=float(key.split("tau")[1]),
    )
    layers = {key: jnp.abs(v[key]) for key in v.keys(r"layer\d+")}
    for key in v.keys(r"budget_.*"):
        targets = pdp.layer_targets(layers, float(key.split("_")[1]))
        results[key] = jnp.stack(list(targets.values()))
    epochs = v["ramp_epoch"]
    target = v.numpy("ramp_r")[-1]  # the ramp is over by then
    results["ramp_r"] = jnp.stack([pdp.ratio_at(epoch, target) for epoch in epochs])
    return results


def compress_lapp_threshold(v):
    temperature = float(v.numpy("temperature"))

    def mask(score, threshold):
        return lapp.threshold_mask(score, threshold, temperature=temperature)

    value, back = jax.vjp(mask, v["score"], v["threshold"])
    dscore, dthreshold = back(v["dy"])
    # A chain of layers, the second of which has these filters.
    flops = v.numpy("flops")
    macs = {str(i): float(count) for i, count in enumerate(flops)}
    kept = jnp.mean(value)
    share = lapp.flops_share(macs, {"2": kept}, {"1": kept})
    now = share * float(flops.sum())
    return {
        "mask": value,
        "dscore": dscore,
        "dthreshold": dthreshold,
        "flops_now": now,
        "flops_loss": lapp.flops_loss(now, v["flops_target"]),
    }
