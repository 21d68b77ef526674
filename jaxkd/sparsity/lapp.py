"""LAPP: filters are pruned while a network learns, by one learned threshold per layer.

Each convolution (and product) whose outputs can be taken away has a threshold `theta`.
Its channel `c` takes part if its score exceeds it, `mask_c = 1[score_c > theta]`, with
the gradient of `sigmoid((score_c - theta) / T)`. A term of the loss,
`log(max(F / F_target, 1))`, raises thresholds until the network's arithmetic `F` is
down to the target; then the masks stay as they are, and the network goes on learning.

No code was published for the paper, so this is the definition of this project, after
its abstract. Channels that are pruned are closed (see `jaxkd.sparsity.shrink`), so that
the trained network can be made smaller without a change of its outputs. Facts in the
log: `flops_share`, `F` over that of the dense network, and `frozen`.

Reference: "LAPP: layer adaptive progressive pruning for compressing CNNs from scratch",
2023 (the idea).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxkd.compression import (
    After,
    Arrays,
    Compression,
    State,
    apply_masks,
    flatten,
    register,
)
from jaxkd.layers import BatchNorm, kaiming_normal, rules
from jaxkd.layers.convolution import Conv
from jaxkd.sparsity.channels import Channels, find_channels

Score = Literal["gamma", "kernel"]


def threshold_mask(
    scores: jax.Array, limit: jax.Array, *, temperature: float = 0.1
) -> jax.Array:
    """1 where a score exceeds the limit, else 0; the gradient is that of a sigmoid.

    Args:
      scores: of any shape.
      limit: a scalar.
      temperature: `T` of `sigmoid((score - limit) / T)`.

    Returns:
      Floats in the shape of the scores.
    """
    soft = jax.nn.sigmoid((scores - limit) / temperature)
    hard = (scores > limit).astype(soft.dtype)
    return hard + (soft - jax.lax.stop_gradient(soft))


def flops_share(
    macs: Mapping[str, float], kept_in: Arrays, kept_out: Arrays
) -> jax.Array:
    """What is left of the arithmetic: `sum(macs * kept_in * kept_out) / sum(macs)`.

    Args:
      macs: multiply-accumulates of each layer.
      kept_in: by layer the share of its input channels that is left; 1 where missing.
      kept_out: the same of its output channels.
    """
    one = jnp.ones(())
    total = sum(macs.values())
    left = sum(
        count / total * kept_in.get(path, one) * kept_out.get(path, one)
        for path, count in macs.items()
    )
    return jnp.asarray(left)


def flops_loss(share: jax.Array, target: jax.Array | float) -> jax.Array:
    """`log(max(F / F_target, 1))`.

    Args:
      share: `F`.
      target: `F_target`, in the same unit.
    """
    ratio = share / target
    return jnp.log(jnp.where(ratio > 1, ratio, 1.0))


@register()
def lapp(
    *,
    flops: float = 0.5,
    weight: float = 1.0,
    temperature: float = 0.1,
    score: Score = "gamma",
    threshold_scale: float = 10.0,
    bypass: bool = False,
) -> Compression:
    """Pruning of filters from scratch by learned thresholds, down to a share of FLOPs.

    Every layer keeps its channel with the largest score. With a bypass, a depthwise
    convolution of the same kernel size and stride, a 1x1 convolution and a batch norm
    lie beside every pruned convolution, and their sum is passed on: all channels go on
    carrying something, so that later layers lose no inputs, and such a network cannot
    be made smaller by `jaxkd.sparsity.shrink`.

    Args:
      flops: `F_target`, the share of the dense network's multiply-accumulates that is
        wanted, in (0, 1).
      weight: of the term (lambda).
      temperature: of the surrogate gradient.
      score: "gamma", the absolute scale of the batch norm that follows (the L1 norm of
        the kernel slice where none does), or "kernel", that norm everywhere.
      threshold_scale: thresholds are this times what is trained, which gives them a
        learning rate of their own: `threshold_scale^2` times that of the weights with
        SGD, `threshold_scale` times with Adam. At score 1 and temperature 0.1 gradients
        are small at first.
      bypass: see above.

    Raises:
      ValueError: an impossible value.
    """
    if not 0 < flops < 1:
        raise ValueError(f"flops must be in (0, 1), got {flops}")
    for name, value in (
        ("weight", weight),
        ("temperature", temperature),
        ("threshold_scale", threshold_scale),
    ):
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be finite and > 0, got {value}")

    def fit(init: Any, logits: Any, input_shape: Any) -> Compression:
        params = jax.eval_shape(
            lambda key: flatten(init(key)["params"]), jax.random.key(0)
        )
        pruning = _Pruning(
            channels=find_channels(init, logits, input_shape),
            shapes={path: x.shape for path, x in params.items()},
            flops=flops,
            weight=weight,
            temperature=temperature,
            score=score,
            scale=threshold_scale,
            bypass=bypass,
        )
        return pruning.compression()

    def init(key: jax.Array, params: Arrays) -> tuple[Arrays, State]:
        del key, params
        raise ValueError(
            "lapp must know the network; give the compression to a network, or call "
            "its fit"
        )

    return Compression(init=init, fit=fit)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Pruning:
    """The functions of the compression `lapp` for one network."""

    channels: Channels
    shapes: Mapping[str, tuple[int, ...]]
    flops: float
    weight: float
    temperature: float
    score: Score
    scale: float
    bypass: bool

    def compression(self) -> Compression:
        if not self.pruned:
            raise ValueError("lapp: no channels of this network can be taken away")
        return Compression(
            init=self.init,
            effective=self.effective,
            masks=self.masks,
            update=self.update,
            terms=self.terms,
            weights={"flops": self.weight},
            facts=self.facts,
            layers=self.layers if self.bypass else None,
            finalise=self.finalise,
        )

    @property
    def pruned(self) -> list[str]:
        """The layers that have a threshold."""
        kinds = ("conv",) if self.bypass else ("conv", "dense")
        return [p for p in self.channels.free if self.channels.sites[p].kind in kinds]

    # ------------------------------------------------------------------------- masks

    def init(self, key: jax.Array, params: Arrays) -> tuple[Arrays, State]:
        del key, params
        sizes = {path: self.channels.sites[path].features for path in self.pruned}
        masks = {path: jnp.ones(size, bool) for path, size in sizes.items()}
        learned = {path: jnp.zeros(()) for path in self.pruned}
        return learned, {"frozen": jnp.zeros((), bool), "masks": masks}

    def scores(self, params: Arrays, path: str) -> jax.Array:
        norm = self.channels.norm(path)
        if self.score == "gamma" and norm is not None:
            return jnp.abs(params[f"{norm}/scale"]).astype(jnp.float32)
        kernel = jnp.abs(params[f"{path}/kernel"]).astype(jnp.float32)
        return jnp.sum(kernel, tuple(range(kernel.ndim - 1)))

    def current(self, learned: Arrays, state: State, params: Arrays) -> Arrays:
        """The masks of now as floats, with surrogate gradients until they are kept."""
        found = {}
        for path in self.pruned:
            scores = self.scores(params, path)
            limit = self.scale * learned[path]
            mask = threshold_mask(scores, limit, temperature=self.temperature)
            best = jnp.arange(len(scores)) == jnp.argmax(scores)
            mask = jnp.where(best, 1.0, mask)
            kept = state["masks"][path].astype(mask.dtype)
            found[path] = jnp.where(state["frozen"], kept, mask)
        return found

    def effective(self, learned: Arrays, state: State, params: Arrays) -> Arrays:
        new = dict(params)
        for path, mask in self.current(learned, state, params).items():
            for name, belongs in self.gates(path, params).items():
                gate = jnp.where(jnp.asarray(belongs) < 0, 1.0, mask[belongs])
                new[name] = (new[name] * _row(gate, new[name])).astype(new[name].dtype)
        return new

    def gates(self, path: str, params: Arrays) -> dict[str, np.ndarray]:
        """The parameters that a mask multiplies, as `Channels.gates`."""
        found = {} if self.bypass else self.channels.gates(path)
        own = np.arange(self.channels.sites[path].features)
        if self.bypass or self.channels.norm(path) is None:
            found = {**found, f"{path}/kernel": own, f"{path}/bias": own}
        return {name: x for name, x in found.items() if name in params}

    def masks(self, state: State) -> Arrays:
        """All closed once they are kept: kernel columns, biases, norms."""
        found: Arrays = {}
        for path in self.pruned:
            mask = state["masks"][path] | ~state["frozen"]
            own = np.arange(self.channels.sites[path].features)
            gates = {} if self.bypass else self.channels.gates(path)
            gates = {**gates, f"{path}/kernel": own, f"{path}/bias": own}
            for name, belongs in gates.items():
                if name not in self.shapes:
                    continue
                gate = mask[belongs] | jnp.asarray(belongs < 0)
                gate = gate.reshape((1,) * (len(self.shapes[name]) - 1) + (-1,))
                found[name] = found[name] & gate if name in found else gate
        return found

    def finalise(self, learned: Arrays, state: State, params: Arrays) -> Arrays:
        masks = self.current(learned, state, params)
        kept = {path: mask > 0.5 for path, mask in masks.items()}
        closed = self.masks({"frozen": jnp.ones((), bool), "masks": kept})
        return apply_masks(params, closed)

    def update(
        self, learned: Arrays, state: State, after: After
    ) -> tuple[Arrays, State]:
        masks = self.current(learned, state, after.params)
        reached = self.share(masks) <= self.flops
        kept = {path: mask > 0.5 for path, mask in masks.items()}
        return after.params, {"frozen": state["frozen"] | reached, "masks": kept}

    # ------------------------------------------------------------------------- costs

    def share(self, masks: Arrays) -> jax.Array:
        """What is left of the arithmetic."""
        sites = self.channels.sites
        macs = {path: float(site.macs) for path, site in sites.items()}
        kept_out = {path: jnp.mean(mask) for path, mask in masks.items()}
        kept_in = {} if self.bypass else self.kept_in(masks)
        share = flops_share(macs, kept_in, kept_out)
        return share + self.bypass_macs() / sum(macs.values())

    def kept_in(self, masks: Arrays) -> Arrays:
        found = {}
        for path, site in self.channels.sites.items():
            inputs, left = len(site.owner), 0.0
            others = inputs
            for layer, mask in masks.items():
                mine = site.owner == self.channels.layers.index(layer)
                if mine.any():
                    counts = np.bincount(site.channel[mine], minlength=len(mask))
                    left = left + jnp.sum(jnp.asarray(counts, jnp.float32) * mask)
                    others -= int(mine.sum())
            found[path] = (left + jnp.float32(others)) / inputs
        return found

    def bypass_macs(self) -> float:
        """What all bypasses cost."""
        if not self.bypass:
            return 0.0
        total = 0.0
        for path in self.pruned:
            shape = self.shapes[f"{path}/kernel"]
            pixels = self.channels.sites[path].macs / math.prod(shape)
            total += pixels * shape[-2] * (math.prod(shape[:-2]) + shape[-1])
        return total

    def terms(self, learned: Arrays, state: State, params: Arrays) -> Arrays:
        share = self.share(self.current(learned, state, params))
        loss = flops_loss(share, self.flops)
        return {"flops": jnp.where(state["frozen"], 0.0, loss)}

    def facts(self, learned: Arrays, state: State, params: Arrays) -> Arrays:
        return {
            "flops_share": self.share(self.current(learned, state, params)),
            "frozen": state["frozen"].astype(jnp.float32),
        }

    # ------------------------------------------------------------------------ bypass

    def layers(self, train: bool) -> contextlib.AbstractContextManager[Any]:
        return rules.using(self.beside, train=train)

    def beside(self, layer: Any, compute: Any, *args: Any) -> Any:
        """A rule that adds a bypass to the convolutions that are pruned."""
        y = compute(*args)
        if "/".join(layer.path) not in self.pruned or not isinstance(layer, nn.Conv):
            return y
        (x,) = args
        channels = x.shape[-1]
        common: dict[str, Any] = dict(
            use_bias=False, kernel_init=kaiming_normal, dtype=layer.dtype
        )
        z = Conv(
            channels,
            layer.kernel_size,
            strides=layer.strides,
            padding=layer.padding,
            feature_group_count=channels,
            name="bypass_depthwise",
            **common,
        )(x)
        z = Conv(y.shape[-1], (1, 1), name="bypass_pointwise", **common)(z)
        norm = BatchNorm(dtype=y.dtype, name="bypass_norm")
        return y + norm(z, rules.training())


def _row(vector: jax.Array, like: jax.Array) -> jax.Array:
    return vector.reshape((1,) * (like.ndim - 1) + (-1,))
