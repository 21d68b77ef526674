"""PDP: parameter-free differentiable pruning.

Weights are trained dense for some epochs. Then each layer gets the share of it that one
global threshold would take away, and approaches that share by a ramp. While it does, a
weight counts by a soft mask, `m(w) w` with `m(w) = sigmoid((w^2 - t^2) / temperature)`,
where `t` lies between the smallest weight to be kept and the largest to go. The
gradient `m + 2 w^2 / temperature * m (1 - m)` pushes weights near `t` to a side. In the
end the mask is `|w| >= t`.

Masks of single weights and N:M masks are simulated: dense hardware multiplies the zeros
as well, so neither a step nor the trained network is faster. (Some GPUs have units for
2:4; nothing here uses them.) Whole channels can be taken away, see
`jaxkd.sparsity.shrink`. Facts in the log: `density`, the share of the weights (N:M and
channels: of the weights, of the channels) that the ramp keeps, and `target_density`.

Reference: Cho, Adya, Naik, "PDP: parameter-free differentiable pruning is all you
need", NeurIPS 2023.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxkd.compression import After, Arrays, Compression, State, register
from jaxkd.sparsity.channels import Channels, find_channels
from jaxkd.sparsity.dynamic import ScopeOptions, make_scope
from jaxkd.sparsity.masks import Scope

Structure = Literal["unstructured", "n:m", "channel"]


def threshold(magnitudes: jax.Array, ratio: jax.Array | float) -> jax.Array:
    """Halfway between the smallest magnitude to be kept and the largest to go.

    Of `n` magnitudes in descending order `a`, `int((1 - ratio) n)` are kept, at least
    one and at most `n - 1`.

    Args:
      magnitudes: `[..., n]` with n >= 2; the last axis is compared.
      ratio: the share that goes, a scalar; may be traced.

    Returns:
      `[...]`, without a gradient.

    Raises:
      ValueError: fewer than two magnitudes.
    """
    count = magnitudes.shape[-1]
    if count < 2:
        raise ValueError(f"a threshold needs two magnitudes or more, got {count}")
    kept = _kept(count, ratio)
    first = jnp.clip(kept - 1, 0, count - 2)
    ordered = jnp.sort(jax.lax.stop_gradient(magnitudes), axis=-1, descending=True)
    return 0.5 * (
        jnp.take(ordered, first, axis=-1) + jnp.take(ordered, first + 1, axis=-1)
    )


def soft_mask(
    squares: jax.Array, limit: jax.Array, *, temperature: float = 1e-4
) -> jax.Array:
    """`sigmoid((w^2 - t^2) / temperature)`, in float32 whatever the dtype of `w`.

    Args:
      squares: `w^2`, or the squared norms of channels.
      limit: `t`, of the same rank; it gets no gradient.
      temperature: how soft the mask is.

    Returns:
      float32, in the shape of the squares.
    """
    limit = jax.lax.stop_gradient(limit).astype(jnp.float32)
    return jax.nn.sigmoid(
        (squares.astype(jnp.float32) - jnp.square(limit)) / temperature
    )


def layer_targets(magnitudes: Arrays, sparsity: float) -> dict[str, jax.Array]:
    """What share of each layer lies below one threshold for all of them.

    The threshold is the `int(sparsity * N)`-th smallest of all N magnitudes, counted
    from 0; what is strictly smaller goes.

    Args:
      magnitudes: by layer, of any shape.
      sparsity: in [0, 1).
    """
    every = jnp.sort(jnp.concatenate([x.reshape(-1) for x in magnitudes.values()]))
    limit = every[int(sparsity * every.size)]
    return {path: jnp.mean(x < limit) for path, x in magnitudes.items()}


def ratio_at(
    epoch: jax.Array | int, target: jax.Array | float, *, epsilon: float = 0.015
) -> jax.Array:
    """`min(1, epsilon (epoch + 1)) target`, 0 before epoch 0.

    Args:
      epoch: counted from the end of the warm-up.
      target: of the layer.
      epsilon: the share of the ramp that an epoch makes.
    """
    ramp = jnp.minimum(1.0, epsilon * (epoch + 1))
    return jnp.where(jnp.asarray(epoch) < 0, 0.0, ramp * target)


def group_threshold(kernel: jax.Array, *, n: int, m: int) -> jax.Array:
    """Per group of `m` consecutive input channels, halfway between the n-th and next.

    Args:
      kernel: `[..., in, out]`; groups are of one output channel and tap.
      n: how many a group keeps.
      m: the size of a group.

    Returns:
      The limit of each weight, in the kernel's shape.

    Raises:
      ValueError: `n` is not from 1 to `m - 1`, or `m` does not divide the channels.
    """
    _check_group(n, m)
    *lead, inputs, features = kernel.shape
    if inputs % m:
        raise ValueError(f"{inputs} input channels are no multiple of m={m}")
    groups = jnp.abs(kernel).reshape(*lead, inputs // m, m, features)
    limit = threshold(jnp.swapaxes(groups, -1, -2), 1.0 - n / m)
    limit = jnp.broadcast_to(limit[..., None, :], groups.shape)
    return limit.reshape(kernel.shape)


def channel_norms(kernel: jax.Array) -> jax.Array:
    """The L2 norm of each output channel, `[features]` float32."""
    return jnp.sqrt(_square_norms(kernel))


@register()
def pdp(
    *,
    sparsity: float = 0.9,
    structure: Structure = "unstructured",
    n: int = 2,
    m: int = 4,
    warmup_epochs: int = 16,
    epsilon: float = 0.015,
    temperature: float = 1e-4,
    scope: ScopeOptions = None,
) -> Compression:
    """Pruning by soft masks of weights, of groups of input channels, or of channels.

    With "channel" the norm of a channel's kernel stands for `|w|`, and the mask scales
    the kernel, its bias, and scale and bias of the norms that the channel goes through:
    the norm after a convolution would undo a mask of the kernel alone. Only channels
    that can be taken away take part (`jaxkd.sparsity.channels`). With "n:m" every group
    keeps `n` of `m` from the end of the warm-up on, without a ramp; layers whose input
    channels `m` does not divide stay dense.

    Args:
      sparsity: of all weights (channels) together, in [0, 1); "n:m" has `1 - n / m` and
        does not read it.
      structure: see above.
      n: of "n:m", how many of a group stay.
      m: of "n:m", the size of a group.
      warmup_epochs: dense epochs before; the targets are fixed at their end.
      epsilon: the share of the ramp that an epoch makes.
      temperature: of the soft mask (tau).
      scope: which kernels take part ("channel": ignored); options of
        `jaxkd.sparsity.masks.Scope`.

    Raises:
      ValueError: an impossible value.
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must be in [0, 1), got {sparsity}")
    _check_group(n, m)
    if warmup_epochs < 0:
        raise ValueError(f"warmup_epochs must be >= 0, got {warmup_epochs}")
    for name, value in (("epsilon", epsilon), ("temperature", temperature)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be finite and > 0, got {value}")
    pruning = _Pruning(
        sparsity=sparsity, structure=structure, n=n, m=m, warmup_epochs=warmup_epochs,
        epsilon=epsilon, temperature=temperature, scope=make_scope(scope),
    )  # fmt: skip
    return pruning.compression()


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Pruning:
    """The functions of the compression `pdp`; the state holds targets and ratios."""

    sparsity: float
    structure: Structure
    n: int
    m: int
    warmup_epochs: int
    epsilon: float
    temperature: float
    scope: Scope
    channels: Channels | None = None

    def compression(self) -> Compression:
        fits = self.structure == "channel" and self.channels is None
        return Compression(
            init=self.init,
            effective=self.effective,
            update=self.update,
            facts=self.facts,
            finalise=self.finalise,
            fit=self.fit if fits else None,
        )

    def fit(self, init: Any, logits: Any, input_shape: Any) -> Compression:
        channels = find_channels(init, logits, input_shape)
        if not channels.free:
            raise ValueError("pdp: no channels of this network can be taken away")
        return dataclasses.replace(self, channels=channels).compression()

    # ------------------------------------------------------------------------- state

    def init(self, key: jax.Array, params: Arrays) -> tuple[Arrays, State]:
        del key
        paths = self.paths(params)
        if self.warmup_epochs == 0 or self.structure == "n:m":
            targets = self.targets({path: params[path] for path in paths})
        else:
            targets = {path: jnp.zeros(()) for path in paths}
        epoch = -self.warmup_epochs
        return {}, {
            "targets": targets,
            "ratios": {path: self.ratio(epoch, targets[path]) for path in paths},
        }

    def paths(self, params: Arrays) -> list[str]:
        """The kernels that take part."""
        if self.structure == "channel":
            if self.channels is None:
                raise ValueError(
                    "pdp: structure='channel' must know the network; give the "
                    "compression to a network, or call its fit"
                )
            return [f"{path}/kernel" for path in self.channels.free]
        chosen = [p for p in self.scope.select(params) if params[p].size > 1]
        if self.structure == "n:m":
            chosen = [p for p in chosen if params[p].shape[-2] % self.m == 0]
            if not chosen:
                raise ValueError(
                    f"pdp: m={self.m} divides the input channels of no kernel"
                )
        return chosen

    def magnitudes(self, kernel: jax.Array) -> jax.Array:
        if self.structure == "channel":
            return channel_norms(kernel)
        return jnp.abs(kernel).astype(jnp.float32)

    def targets(self, kernels: Arrays) -> dict[str, jax.Array]:
        if self.structure == "n:m":
            return {path: jnp.float32(1 - self.n / self.m) for path in kernels}
        sizes = {path: self.magnitudes(x) for path, x in kernels.items()}
        return layer_targets(sizes, self.sparsity)

    def ratio(self, epoch: Any, target: jax.Array) -> jax.Array:
        # A group of N:M has no ratio in between.
        epsilon = 1.0 if self.structure == "n:m" else self.epsilon
        return ratio_at(epoch, target, epsilon=epsilon)

    def update(
        self, learned: Arrays, state: State, after: After
    ) -> tuple[Arrays, State]:
        del learned
        start = self.warmup_epochs * after.steps_per_epoch
        if start >= after.total_steps:
            raise ValueError(
                f"pdp: warmup_epochs={self.warmup_epochs} leaves nothing of the "
                f"{after.total_steps // after.steps_per_epoch} epochs of the stage"
            )
        kernels = {path: after.params[path] for path in state["targets"]}
        done = after.step + 1
        targets = jax.lax.cond(
            done == start, self.targets, lambda _: state["targets"], kernels
        )
        epoch = done // after.steps_per_epoch - self.warmup_epochs
        ratios = {path: self.ratio(epoch, x) for path, x in targets.items()}
        return after.params, {"targets": targets, "ratios": ratios}

    # ------------------------------------------------------------------------- masks

    def limits(self, kernel: jax.Array, ratio: jax.Array) -> jax.Array:
        """The limits of a kernel's magnitudes, of their shape."""
        if self.structure == "n:m":
            return group_threshold(kernel, n=self.n, m=self.m)
        sizes = self.magnitudes(kernel)
        limit = threshold(sizes.reshape(-1), ratio)
        return jnp.broadcast_to(limit, sizes.shape)

    def soft(self, kernel: jax.Array, ratio: jax.Array) -> jax.Array:
        """The soft mask of a kernel, 1 where nothing is pruned yet."""

        def pruned(kernel: jax.Array) -> jax.Array:
            squares = (
                _square_norms(kernel)
                if self.structure == "channel"
                else jnp.square(kernel.astype(jnp.float32))
            )
            limits = self.limits(kernel, ratio)
            return soft_mask(squares, limits, temperature=self.temperature)

        def whole(kernel: jax.Array) -> jax.Array:
            shape = kernel.shape[-1:] if self.structure == "channel" else kernel.shape
            return jnp.ones(shape, jnp.float32)

        return jax.lax.cond(ratio > 0, pruned, whole, kernel)

    def hard(self, kernel: jax.Array, ratio: jax.Array) -> jax.Array:
        """Which weights (channels) stay."""
        keep = self.magnitudes(kernel) >= self.limits(kernel, ratio)
        return keep | (ratio <= 0)

    def effective(self, learned: Arrays, state: State, params: Arrays) -> Arrays:
        del learned
        masks = {p: self.soft(params[p], r) for p, r in state["ratios"].items()}
        return self.scaled(params, masks)

    def finalise(self, learned: Arrays, state: State, params: Arrays) -> Arrays:
        del learned
        return self.scaled(params, self.hard_masks(state, params))

    def hard_masks(self, state: State, params: Arrays) -> Arrays:
        return {p: self.hard(params[p], r) for p, r in state["ratios"].items()}

    def scaled(self, params: Arrays, masks: Arrays) -> Arrays:
        """The parameters times their masks."""
        new = dict(params)
        for kernel, mask in masks.items():
            if self.channels is None:
                new[kernel] = _times(params[kernel], mask)
                continue
            path = kernel.removesuffix("/kernel")
            for name in (kernel, f"{path}/bias"):
                if name in new:
                    new[name] = _times(new[name], mask)
            for name, belongs in self.channels.gates(path).items():
                if name in new:
                    gate = jnp.where(jnp.asarray(belongs) < 0, 1, mask[belongs])
                    new[name] = _times(new[name], gate)
        return new

    def facts(self, learned: Arrays, state: State, params: Arrays) -> Arrays:
        del learned

        def density(ratios: Arrays) -> jax.Array:
            kept, total = jnp.zeros(()), 0
            for path, ratio in ratios.items():
                size = self.size(params[path])
                count = jnp.clip(_kept(size, ratio), 1, size)
                if self.structure == "n:m":
                    count = size * (1 - ratio)
                kept, total = kept + count, total + size
            return (kept / total).astype(jnp.float32)

        wanted = 1 - self.sparsity
        if self.structure == "n:m":
            wanted = self.n / self.m
        return {
            "density": density(state["ratios"]),
            "target_density": jnp.float32(wanted),
        }

    def size(self, kernel: jax.Array) -> int:
        return kernel.shape[-1] if self.structure == "channel" else kernel.size


def hard_masks(
    params: Arrays,
    ratios: Mapping[str, jax.Array | float],
    *,
    structure: Structure = "unstructured",
    n: int = 2,
    m: int = 4,
) -> Arrays:
    """The masks of deployment, `|w| >= t`.

    Args:
      params: kernels by path.
      ratios: the shares that go, scalars; the others are left alone. A layer with ratio
        0 keeps all.
      structure: as of `pdp`.
      n: as of `pdp`.
      m: as of `pdp`.

    Returns:
      By path bool masks in the shapes of the kernels, "channel": `[features]`.
    """
    pruning = _Pruning(
        sparsity=0.0, structure=structure, n=n, m=m, warmup_epochs=0, epsilon=1.0,
        temperature=1.0, scope=Scope(),
    )  # fmt: skip
    found = {path: jnp.asarray(ratio) for path, ratio in ratios.items()}
    return pruning.hard_masks({"ratios": found}, params)


def _kept(count: int, ratio: jax.Array | float) -> Any:
    kept = (1.0 - ratio) * jnp.asarray(count, jnp.float32)
    # A share that was rounded in float32 must not lose a whole weight.
    return jnp.floor(kept + 1e-3).astype(jnp.int32)


def _square_norms(kernel: jax.Array) -> jax.Array:
    squares = jnp.square(kernel.astype(jnp.float32))
    return jnp.sum(squares, tuple(range(kernel.ndim - 1)))


def _times(x: jax.Array, mask: jax.Array) -> jax.Array:
    """`x` times a mask of its last axes, in the dtype of `x`."""
    mask = mask.reshape((1,) * (x.ndim - mask.ndim) + mask.shape)
    return (x.astype(jnp.float32) * mask).astype(x.dtype)


def _check_group(n: int, m: int) -> None:
    if not 1 <= n < m:
        raise ValueError(f"n must be from 1 to m - 1, got n={n}, m={m}")
