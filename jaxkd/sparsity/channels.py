"""Which channels of a network may be taken away, found by watching it run.

No model file says which layer reads what. `find_channels` runs a network on marks:
every output channel of every convolution and product is raised in some images of a
batch, and the images in which an input channel of a later layer differs from the last,
unmarked image spell the layer and the channel that it comes from. What mixes channels
(a sum with a shortcut, attention, a layer norm) mixes the marks. A layer is *free* if
all that reads its channels reads each of them alone, and if the network without one of
them still runs and connects the others as before. The last layer is not free, nor are
layers that end in a residual sum. A mark that gets lost on its way cannot make a layer
free by mistake: the network without the channel would have shapes that do not fit.

The cost is small: marks are put in the place of the results of convolutions, which are
computed for one image alone, for their shapes.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxkd.layers import BatchNorm, rules
from jaxkd.layers.convolution import Conv
from jaxkd.layers.dense import Dense

Variables = dict[str, Any]
Logits = Callable[[Variables, jax.Array], jax.Array]
"""`logits(variables, images)`, in evaluation."""
Keep = Mapping[str, np.ndarray]
"""Which output channels of free layers stay, bool `[features]` by the layer's path."""

_NOBODY, _SEVERAL = -1, -2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Site:
    """A layer that reads channels.

    Attributes:
      path: of the layer, "stage1_block1/conv1".
      kind: "conv", "dense", "depthwise", "grouped" (a convolution of channel groups) or
        "norm".
      features: output channels.
      macs: multiply-accumulates for one image; 0 for norms.
      owner: of each input channel the index in `Channels.layers` of the layer that it
        comes from; -1 if from none, -2 if from several or several channels.
      channel: of each input channel the owner's output channel; -1 without one.
    """

    path: str
    kind: str
    features: int
    macs: int
    owner: np.ndarray
    channel: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Channels:
    """The layers of a network and where their input channels come from.

    Attributes:
      layers: paths of all convolutions and products but depthwise ones, which pass
        their channels on, in the order of calls.
      sites: all layers that read channels, in the order of calls.
      free: paths of the layers whose output channels may be taken away.
    """

    layers: tuple[str, ...]
    sites: Mapping[str, Site]
    free: tuple[str, ...]

    def readers(self, path: str) -> list[Site]:
        """The layers that read channels of a layer, in the order of calls."""
        index = self.layers.index(path)
        return [site for site in self.sites.values() if (site.owner == index).any()]

    def norm(self, path: str) -> str | None:
        """The first batch norm that reads this layer's channels as they are, if any."""
        features, index = np.arange(self.sites[path].features), self.layers.index(path)
        for site in self.readers(path):
            if site.kind == "norm" and (site.owner == index).all():
                if np.array_equal(site.channel, features):
                    return site.path
        return None

    def gates(self, path: str) -> dict[str, np.ndarray]:
        """What makes channels of a layer zero wherever they go, once its own are.

        Returns:
          By parameter the channel that each entry of its last axis belongs to, -1 where
          it is none of this layer's: scales and biases of the norms, and biases of the
          depthwise convolutions, that the channels go through.
        """
        index, found = self.layers.index(path), {}
        for site in self.readers(path):
            belongs = np.where(site.owner == index, site.channel, -1)
            if site.kind == "norm":
                found[f"{site.path}/scale"] = found[f"{site.path}/bias"] = belongs
            elif site.kind == "depthwise":
                width = site.features // len(belongs)
                found[f"{site.path}/bias"] = np.repeat(belongs, width)
        return found

    def reading(self, path: str, keep: Keep) -> np.ndarray:
        """Which input channels of a layer stay, bool `[inputs]`."""
        site = self.sites[path]
        stay = np.ones(len(site.owner), bool)
        for layer, kept in keep.items():
            mine = site.owner == self.layers.index(layer)
            stay[mine] = kept[site.channel[mine]]
        return stay

    def writing(self, path: str, keep: Keep) -> np.ndarray:
        """Which output channels of a layer stay, bool `[features]`."""
        site = self.sites[path]
        if site.kind in ("norm", "depthwise"):
            inputs = self.reading(path, keep)
            return np.repeat(inputs, site.features // len(inputs))
        return np.asarray(keep.get(path, np.ones(site.features, bool)))

    def sizes(self, keep: Keep) -> dict[str, tuple[int, int]]:
        """Outputs and groups of every convolution and product that are left."""
        found = {}
        for path, site in self.sites.items():
            if site.kind in ("norm", "grouped"):
                continue
            left = int(self.writing(path, keep).sum())
            found[path] = (left, left if site.kind == "depthwise" else 1)
            if site.kind == "depthwise":
                found[path] = (left, int(self.reading(path, keep).sum()))
        return found

    def check(self, keep: Keep) -> None:
        """Checks which channels are to stay.

        Raises:
          ValueError: a layer is not free, or a mask does not fit it or keeps nothing.
        """
        for path, kept in keep.items():
            if path not in self.free:
                raise ValueError(
                    f"the channels of {path!r} cannot be taken away; those of "
                    f"{', '.join(self.free) or 'no layer'} can"
                )
            features = self.sites[path].features
            if np.shape(kept) != (features,) or not np.any(kept):
                raise ValueError(
                    f"what stays of {path!r} must be bool [{features}] with at least "
                    f"one True, got shape {np.shape(kept)}, {np.sum(kept)} True"
                )


@contextlib.contextmanager
def sized(sizes: Mapping[str, tuple[int, int]], *, train: bool) -> Iterator[None]:
    """Within it, layers have other numbers of outputs and groups, by their paths."""

    def rule(layer: Any, compute: Callable[..., Any], *args: Any) -> Any:
        path = "/".join(layer.path)
        if path in sizes:
            features, groups = sizes[path]
            rules.set_features(layer, features)
            if isinstance(layer, nn.Conv):
                # As its features: the layer was made for this call.
                object.__setattr__(layer, "feature_group_count", groups)
        return compute(*args)

    with rules.using(rule, train=train):
        yield


def find_channels(
    init: Callable[[jax.Array], Variables],
    logits: Logits,
    input_shape: Sequence[int],
) -> Channels:
    """Finds out where the input channels of a network's layers come from.

    Args:
      init: `init(key) -> variables`; only shapes are read.
      logits: `logits(variables, images)`, in evaluation.
      input_shape: `(height, width, channels)` of the images.

    Returns:
      The channels; `free` is empty if the network has no layers that are seen.

    Raises:
      ValueError: the network reads images of a batch together.
    """
    variables = jax.eval_shape(init, jax.random.key(0))
    seen = _watch(logits, variables, input_shape, ())
    passing = ("norm", "depthwise")
    layers = tuple(p for p, s in seen.kinds.items() if s[0] not in passing)
    if not layers:
        return Channels(layers=(), sites={}, free=())
    most = max(seen.kinds[path][1] for path in layers)
    seen = _watch(logits, variables, input_shape, layers, most)
    whole = Channels(layers=layers, sites=seen.sites(), free=())
    candidates = [p for p in layers if _may_be_free(whole, seen, p)]
    free: list[str] = []
    if _all_free(whole, candidates, logits, variables, input_shape):
        free = candidates
    else:
        for path in candidates:
            if _all_free(whole, [*free, path], logits, variables, input_shape):
                free.append(path)
    return dataclasses.replace(whole, free=tuple(free))


def slice_variables(channels: Channels, variables: Variables, keep: Keep) -> Variables:
    """The variables without the channels that do not stay.

    Args:
      channels: of the network.
      variables: of the network, concrete or abstract.
      keep: which channels stay; layers that are missing stay whole.
    """

    def cut(path: tuple[Any, ...], x: Any) -> Any:
        kind, *scope, name = (str(getattr(k, "key", k)) for k in path)
        site = channels.sites.get("/".join(scope))
        if site is None or (kind == "params" and x.ndim == 0):
            return x
        reads = channels.reading(site.path, keep)
        writes = channels.writing(site.path, keep)
        if x.shape[-1] == len(writes):
            x = _take(x, writes, -1)
        if name == "kernel" and site.kind in ("conv", "dense"):
            x = _take(x, reads, -2)
        return x

    return jax.tree.map_with_path(cut, variables)


def _take(x: Any, stay: np.ndarray, axis: int) -> Any:
    if stay.all():
        return x
    if isinstance(x, jax.ShapeDtypeStruct):
        shape = list(x.shape)
        shape[axis] = int(stay.sum())
        return jax.ShapeDtypeStruct(tuple(shape), x.dtype)
    return jnp.take(x, jnp.asarray(np.flatnonzero(stay)), axis=axis)


# ------------------------------------------------------------------------------- marks


@dataclasses.dataclass
class _Seen:
    """What was seen of the layers while a network ran.

    Attributes:
      layers: those that were marked.
      kinds: by path (kind, features, macs, calls, whether a rule can change it).
      marks: by path which images had a mark in which input channel,
        `[images, inputs]`.
      ends: the images whose logits had a mark.
    """

    layers: Sequence[str]
    kinds: dict[str, tuple[str, int, int, int, bool]]
    marks: dict[str, np.ndarray]
    ends: np.ndarray

    def sites(self) -> dict[str, Site]:
        found = {}
        for path, (kind, features, macs, _, _) in self.kinds.items():
            owner, channel = self._origin(self.marks[path])
            found[path] = Site(
                path=path, kind=kind, features=features, macs=macs, owner=owner,
                channel=channel,
            )  # fmt: skip
        return found

    def _origin(self, marks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        count = len(self.layers)
        reached, codes = marks[:count], marks[count:-1]
        ones, zeros = np.split(codes, 2)
        owner = np.where(reached.any(0), reached.argmax(0), _NOBODY)
        several = (reached.sum(0) > 1) | (ones & zeros).any(0)
        owner = np.where(several, _SEVERAL, owner)
        powers = 2 ** np.arange(len(ones))
        channel = (ones * powers[:, None]).sum(0)
        return owner, np.where(owner >= 0, channel, -1)

    def reached(self, path: str) -> np.ndarray:
        """By which layers each input channel is reached, `[layers, inputs]`."""
        return self.marks[path][: len(self.layers)]


def _watch(
    logits: Logits, variables: Variables, input_shape: Sequence[int],
    layers: Sequence[str], features: int = 1,
) -> _Seen:  # fmt: skip
    """Runs a network on marks; `layers` are marked, all others are only seen.

    Image `i` has a mark in all channels of layer `i`; of the images after these, one
    per bit of a channel's number has it in the channels where the bit is set, and
    another where it is not. The last image has none. `features` is the most that a
    layer has.
    """
    kinds: dict[str, tuple[str, int, int, int, bool]] = {}
    marks: dict[str, np.ndarray] = {}
    inside: set[str] = set()
    one: list[jax.Array] = []
    bits = max(features - 1, 1).bit_length()
    images = len(layers) + 2 * bits + 1
    numbers = {path: i for i, path in enumerate(layers)}

    def note(path: str, found: Any) -> None:
        found = np.array(found)  # a copy: the buffer is used again
        marks[path] = marks[path] | found if path in marks else found

    def look(path: str, x: jax.Array) -> jax.Array:
        if x.shape[0] != images:
            raise ValueError(
                f"layer {path!r} got {x.shape[0]} images of {images}; the channels of "
                "networks that join images cannot be found"
            )
        found = _differs(x, tuple(range(1, x.ndim - 1)))
        jax.debug.callback(lambda seen: note(path, seen), found)
        return found

    def marked(path: str, y: jax.Array, through: Any = False) -> jax.Array:
        """Values of the shape of `y` for all images, with the marks of a layer."""
        features = y.shape[-1]
        table = np.zeros((images, features), bool)
        if path in numbers:
            table[numbers[path]] = True
            code = (np.arange(features) >> np.arange(bits)[:, None]) & 1
            table[len(layers) : -1] = np.concatenate([code == 1, code == 0])
        return _spread(jnp.asarray(table) | through, y, one[0])

    def interceptor(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if context.method_name != "__call__":
            return call(*args, **kwargs)
        path = "/".join(module.path)
        obeys = isinstance(module, Conv | Dense | BatchNorm)
        if isinstance(module, BatchNorm | nn.BatchNorm):
            x = args[0]
            _count(kinds, path, ("norm", x.shape[-1], 0), obeys)
            look(path, x)
            return call(*args, **kwargs)
        if not isinstance(module, nn.Conv | nn.Dense):
            return call(*args, **kwargs)
        if obeys and path not in inside:
            # Rules come first; what they leave of the layer is called again.
            inside.add(path)
            try:
                return call(*args, **kwargs)
            finally:
                inside.discard(path)
        (x,) = args or kwargs.values()
        found = look(path, x)
        y = call(x[-1:])
        _count(kinds, path, _kind(module, x, y), obeys)
        if kinds[path][0] == "depthwise":
            through = jnp.repeat(found, y.shape[-1] // x.shape[-1], axis=-1)
            return marked(path, y, through)
        return marked(path, y)

    def run(variables: Variables, x: jax.Array) -> jax.Array:
        # A one that XLA does not know: it would compute all marks while it compiles.
        one.append(x[0, 0, 0, 0])
        with nn.intercept_methods(interceptor):
            y = logits(variables, x)
        return _differs(y, tuple(range(1, y.ndim)))

    x = jnp.ones((images, *input_shape), jnp.float32)
    if not layers:
        jax.eval_shape(run, variables, x)
        return _Seen((), kinds, {}, np.zeros(1, bool))
    ones = jax.tree.map(lambda v: jnp.ones(v.shape, v.dtype), variables)
    ends = np.asarray(jax.jit(run)(ones, x))
    jax.effects_barrier()
    return _Seen(layers, kinds, marks, ends)


_RAISED = 0.5
# Unmarked images may differ by rounding where a product was computed for several.
_TOLERANCE = 1e-3


def _spread(table: jax.Array, y: jax.Array, one: jax.Array) -> jax.Array:
    """Values near 1, raised where `table` `[images, features]` is set, like `y`.

    They vary over the image, so that no norm over it makes them equal; positive ones
    pass every usual activation.
    """
    images, features = table.shape
    middle = y.shape[1:-1]
    count = int(np.prod(middle, dtype=np.int64))
    field = 1.0 + 0.25 * np.modf(0.618034 * np.arange(count))[0]
    field = one * jnp.asarray(field.reshape(1, *middle, 1), jnp.float32)
    raised = _RAISED * table.reshape(images, *(1,) * len(middle), features)
    return (field + raised).astype(y.dtype)


def _differs(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Where an image differs from the last one; any of these axes."""
    distance = jnp.abs((x - x[-1:]).astype(jnp.float32))
    found = distance > _TOLERANCE * jnp.abs(x[-1:]).astype(jnp.float32)
    return found.any(axes) if axes else found


def _kind(module: Any, x: jax.Array, y: jax.Array) -> tuple[str, int, int]:
    """Kind, features and multiply-accumulates of a convolution or product."""
    inputs, features = x.shape[-1], y.shape[-1]
    positions = int(np.prod(y.shape[1:-1], dtype=np.int64))
    if isinstance(module, nn.Dense):
        return "dense", features, positions * inputs * features
    groups = module.feature_group_count
    macs = positions * int(np.prod(module.kernel_size)) * inputs * features // groups
    kind = "conv" if groups == 1 else "depthwise" if groups == inputs else "grouped"
    return kind, features, macs


def _count(kinds: Any, path: str, of: tuple[str, int, int], obeys: bool) -> None:
    _, _, before, calls, _ = kinds.get(path, ("", 0, 0, 0, False))
    kinds[path] = (of[0], of[1], before + of[2], calls + 1, obeys)


def _may_be_free(channels: Channels, seen: _Seen, path: str) -> bool:
    """Whether nothing mixes the channels of a layer, as far as the marks tell."""
    kind, features, _, calls, obeys = seen.kinds[path]
    index = channels.layers.index(path)
    if kind not in ("conv", "dense") or features < 2 or calls > 1 or not obeys:
        return False
    if seen.ends[index]:
        return False
    reads = False
    for site in channels.sites.values():
        mine = seen.reached(site.path)[index]
        if not mine.any():
            continue
        reads = True
        alone = (site.owner[mine] == index).all()
        _, _, _, times, changes = seen.kinds[site.path]
        if not alone or site.kind == "grouped" or times > 1:
            return False
        if site.kind == "depthwise" and not changes:
            return False
    return reads


def _all_free(
    channels: Channels,
    paths: Sequence[str],
    logits: Logits,
    variables: Variables,
    input_shape: Sequence[int],
) -> bool:
    """Whether the network without one channel of each layer is connected as before."""
    if not paths:
        return True
    keep = {}
    for path in paths:
        keep[path] = np.ones(channels.sites[path].features, bool)
        keep[path][0] = False
    return is_connected(channels, keep, logits, variables, input_shape)


def is_connected(
    channels: Channels,
    keep: Keep,
    logits: Logits,
    variables: Variables,
    input_shape: Sequence[int],
) -> bool:
    """Whether a network without some channels connects the others as before.

    Args:
      channels: of the whole network.
      keep: which channels stay.
      logits: of the whole network.
      variables: of the whole network, concrete or abstract.
      input_shape: `(height, width, channels)` of the images.
    """
    smaller = slice_variables(channels, variables, keep)
    try:
        with sized(channels.sizes(keep), train=False):
            most = max(channels.sites[path].features for path in channels.layers)
            seen = _watch(logits, smaller, input_shape, channels.layers, most)
    except (TypeError, ValueError, flax.errors.FlaxError):
        return False
    sites = seen.sites()
    if list(sites) != list(channels.sites):
        return False
    renumbered = {
        channels.layers.index(path): np.cumsum(kept) - 1 for path, kept in keep.items()
    }
    for path, site in channels.sites.items():
        stay = channels.reading(path, keep)
        owner, channel = site.owner[stay], site.channel[stay]
        for index, numbers in renumbered.items():
            mine = owner == index
            channel[mine] = numbers[channel[mine]]
        same = (
            np.array_equal(sites[path].owner, owner)
            and np.array_equal(sites[path].channel, channel)
            and sites[path].features == channels.writing(path, keep).sum()
        )
        if not same:
            return False
    return True
